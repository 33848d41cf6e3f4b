"""The network: MONAI's 3D residual UNet (Kerfoot et al. 2018), and batch statistics over all workers."""

import torch
import torch.distributed as dist
from monai.networks.nets import UNet
from torch import nn

from segcloud.config import Config


def build_network(config: Config) -> nn.Module:
    """The UNet of ``config.model``: [B, 1, X, Y, Z] float → [B, classes, X, Y, Z] logits."""
    model = config.model
    return UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=config.num_classes,
        channels=model.channels,
        strides=model.strides,
        num_res_units=model.num_res_units,
        norm=model.norm,
        dropout=model.dropout,
    )


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm use the statistics of the global batch, so that workers can be added freely.

    PyTorch's own layer serves GPUs only; on CPUs :class:`GlobalBatchNorm3d` computes the same. Parameter
    names stay as they were.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm3d):
            setattr(network, name, GlobalBatchNorm3d.of(child))
        else:
            synchronise_batch_norm(child, device)
    return network


class GlobalBatchNorm3d(nn.BatchNorm3d):
    """Batch norm over the batches of all ranks, for CPUs and gloo; equals ``SyncBatchNorm`` on GPUs."""

    @classmethod
    def of(cls, layer: nn.BatchNorm3d) -> "GlobalBatchNorm3d":
        """The same layer, parameters and buffers included."""
        new = cls(layer.num_features, layer.eps, layer.momentum)
        new.load_state_dict(layer.state_dict())
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, X, Y, Z] → the same shape and dtype."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        y, mean, var, count = _GlobalNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y


class _GlobalNorm(torch.autograd.Function):
    """Normalisation by global statistics: one small all-reduce forward, one backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dims = [0, *range(2, x.ndim)]
        local = x.float()
        var, mean = torch.var_mean(local, dims, correction=0)
        count = torch.full_like(mean, local.numel() / local.shape[1])
        # sums of n, n·mean and n·(var + mean²) over the ranks; float64, since the variance is a difference
        sums = torch.stack([count, count * mean, count * (var + mean * mean)]).double()
        dist.all_reduce(sums)
        total, mean64 = sums[0], sums[1] / sums[0]
        mean, var = mean64.float(), (sums[2] / total - mean64 * mean64).clamp_min(0).float()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        inverse = (var + eps).rsqrt()
        y = torch.addcmul((bias - mean * inverse * weight).view(shape), local, (inverse * weight).view(shape))
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.total = float(total[0])
        ctx.mark_non_differentiable(mean, var)
        return y.to(x.dtype), mean, var, ctx.total

    @staticmethod
    def backward(ctx, grad, *_unused):
        x, weight, mean, inverse = ctx.saved_tensors
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        gradient = grad.float()
        normed = (x.float() - mean.view(shape)) * inverse.view(shape)
        sums = torch.stack([gradient.sum(dims), (gradient * normed).sum(dims)])
        grad_bias, grad_weight = sums.clone()  # DDP averages these over the ranks as any other gradient
        dist.all_reduce(sums)
        mean_grad, mean_grad_normed = (sums / ctx.total).view(2, *shape)
        grad_x = (gradient - mean_grad - normed * mean_grad_normed) * (inverse * weight).view(shape)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None
