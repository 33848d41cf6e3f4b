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
    """Normalisation by global statistics: one small all-reduce forward, one backward.

    Statistics, normalisation and its gradient are PyTorch's own vectorised kernels with *given* statistics;
    written as tensor arithmetic, the same step of the UNet took 1.75 times as long.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        # float32 running statistics, discarded here, make the kernel sum in float32 under autocast too
        mean, var = torch.batch_norm_update_stats(x, torch.zeros_like(weight), torch.ones_like(weight), 0.1)
        count = torch.full_like(mean, x.numel() / x.shape[1])
        # sums of n, n·mean and n·(var + mean²) over the ranks; float64, since the variance is a difference
        sums = torch.stack([count, count * mean, count * (var.double() + mean.double() ** 2)]).double()
        dist.all_reduce(sums)
        total, mean64 = sums[0], sums[1] / sums[0]
        mean, var = mean64.float(), (sums[2] / total - mean64 * mean64).clamp_min(0).float()
        ctx.save_for_backward(x, weight, mean, var)
        ctx.total, ctx.eps = float(total[0]), eps
        ctx.mark_non_differentiable(mean, var)
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], mean, var, ctx.total

    @staticmethod
    def backward(ctx, grad, *_unused):
        x, weight, mean, var = ctx.saved_tensors
        # as if the statistics were constants: the first term of the gradient, and the sums of the others
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        means = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(means)
        means *= weight * (var + ctx.eps).rsqrt() / ctx.total
        # weight / sd · (mean(g) + x̂ · mean(g·x̂)): x̂ scaled and shifted, which is a normalisation again
        grad_x -= torch.native_batch_norm(x, means[0], means[1], mean, var, False, 0.0, ctx.eps)[0]
        return grad_x, grad_weight, grad_bias, None


def activation_bytes(config: Config) -> int:
    """Bytes of all layers' outputs in one training step of one worker, in float32; computes nothing.

    The network runs on PyTorch's meta device, which knows shapes only.
    """
    total = 0

    def count(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * 4

    with torch.device("meta"):
        network = build_network(config)
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        patches = config.train.batch_size // config.compute.workers
        network(torch.empty(patches, 1, *config.train.roi_size))
    return total
