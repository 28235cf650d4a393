"""What differs on a GPU. Without one all of it skips."""

import warnings

import pytest
import torch
from helpers.known_trainings import regression
from helpers.problems import assert_near, directions, tiny_mlp
from torch import nn

import sharpness as sh
from sharpness.batchsize.updates import time_per_update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FEW = 1e3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("engine", ["kept_graph", "compiled"])
def test_products_are_those_of_the_cpu(engine):
    problem = tiny_mlp(dtype=torch.float32, batchnorm=True)
    v = directions(1, problem.risk().n)[0].float()
    risk = problem.risk(device="cuda", engine=engine, chunk_size=7)
    assert_near(risk.hvp(v).cpu(), problem.risk().hvp(v), FEW)
    assert risk.prepare().engine == engine


def test_a_product_does_not_wait_for_the_device():
    risk = tiny_mlp(dtype=torch.float32).risk(device="cuda", chunk_size=7)
    v = directions(1, risk.n)[0].float().cuda()
    risk.hvp(v)
    try:
        with warnings.catch_warnings():  # the mode is a prototype, it says
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        risk.hvp(v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_leave_the_cudnn_flag_as_it_was_R29(kind):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(3, 4, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0][:, -1]

    model, x, y = Last(), torch.randn(6, 5, 3), torch.randint(4, (6,))
    cpu = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y))
    gpu = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y), device="cuda")
    v = directions(1, cpu.n)[0].float()
    before = torch.backends.cudnn.enabled
    assert_near(gpu.hvp(v).cpu(), cpu.hvp(v), FEW)
    assert torch.backends.cudnn.enabled == before


def test_predicted_memory_is_the_peak_within_20_percent():
    model = nn.Sequential(nn.Linear(512, 1024), nn.Tanh(), nn.Linear(1024, 10)).cuda()
    x, y = torch.randn(65536, 512), torch.randint(10, (65536,))
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y), chunk_size=16384)
    v = torch.randn(risk.n, device="cuda")
    predicted = risk.prepare().predicted_bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    risk.hvp(v)
    risk.hvp(v)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(predicted, rel=0.2)


def test_chunks_that_do_not_fit_are_halved_and_give_the_same_mean():
    model = nn.Sequential(nn.Linear(256, 4096), nn.Tanh(), nn.Linear(4096, 10)).cuda()
    x, y = torch.randn(32768, 256), torch.randint(10, (32768,))
    whole = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y), chunk_size=1024)
    v = torch.randn(whole.n, device="cuda")
    expected = whole.hvp(v)
    del whole
    risk = sh.EmpiricalRisk(model, nn.CrossEntropyLoss(), (x, y), chunk_size=32768)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2e9 / total)
    try:
        product = risk.hvp(v)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert risk.chunk_size < 32768
    assert_near(product, expected, FEW)


def test_what_f_owes_to_the_batches_is_seen_there_too():
    problem = tiny_mlp(dtype=torch.float32)
    x, _ = problem.data
    t = torch.sin(3 * problem.model(x).detach())
    for loss, depends in (
        (lambda o, t: ((o - t) ** 2).mean(), False),
        (lambda o, t: ((o - t) ** 2).mean().sqrt(), True),
        (lambda o, t: (torch.rand_like(o) * (o - t) ** 2).mean(), True),
    ):
        risk = sh.EmpiricalRisk(problem.model, loss, (x, t), device="cuda")
        assert bool(risk.notes) == depends
        assert risk.value() == risk.value()


def test_the_memory_of_an_update_is_that_of_the_gpu():
    problem = regression(4096, 64, device="cuda")
    found = time_per_update(problem, [16, 256, 4096])
    assert found.survived.all()
    assert (found.peak_bytes[1:] > found.peak_bytes[:-1]).all()
    assert "GPU" in found.memory
