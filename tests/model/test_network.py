"""The network is the article's, and batch norm over two workers equals batch norm over the whole batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from segcloud.config import Config
from segcloud.model.network import GlobalBatchNorm3d, build_network, synchronise_batch_norm


def test_the_default_network_is_the_articles():
    network = build_network(Config())
    assert sum(p.numel() for p in network.parameters()) == 4_808_917  # MONAI's spleen tutorial UNet
    assert network(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


def test_synchronising_keeps_names_weights_and_single_worker_results():
    torch.manual_seed(0)
    plain = build_network(Config())
    synced = build_network(Config())
    synced.load_state_dict(plain.state_dict())
    synced = synchronise_batch_norm(synced, torch.device("cpu"))
    assert sum(isinstance(m, GlobalBatchNorm3d) for m in synced.modules()) > 10
    assert list(synced.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 1, 16, 16, 16)
    assert torch.equal(plain(x), synced(x))


def _layer_and_data():
    torch.manual_seed(1)
    layer = nn.BatchNorm3d(3)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(4, 3, 5, 6, 7) * 3 + 10, torch.randn(4, 3, 5, 6, 7)


def _one_rank(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    layer, x, g = _layer_and_data()
    layer = GlobalBatchNorm3d.of(layer)
    half = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
    y = layer(half)
    y.backward(g[2 * rank : 2 * rank + 2])
    dist.barrier()
    torch.save(
        [y.detach(), half.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var],
        f"{results}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_ranks_normalise_and_differentiate_as_one(tmp_path):
    mp.start_processes(_one_rank, (tmp_path / "store", tmp_path), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    layer, x, g = _layer_and_data()
    x.requires_grad_()
    y = layer(x)
    y.backward(g)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y, **close)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad, **close)
    torch.testing.assert_close(first[2] + second[2], layer.weight.grad, **close)
    torch.testing.assert_close(first[3] + second[3], layer.bias.grad, **close)
    for index, expected in ((4, layer.running_mean), (5, layer.running_var)):
        torch.testing.assert_close(first[index], expected, **close)
        assert torch.equal(first[index], second[index])
