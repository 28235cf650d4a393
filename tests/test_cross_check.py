"""PyHessian, where it is right, as an independent second opinion."""

import pytest
import torch

import sharpness as sh


@pytest.mark.filterwarnings("ignore")  # it backpropagates with create_graph=True
def test_the_largest_eigenvalue_is_pyhessians():
    pyhessian = pytest.importorskip("pyhessian")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)
    ).double()
    x, y = torch.randn(90, 6).double(), torch.randint(0, 4, (90,))
    loss = torch.nn.CrossEntropyLoss()
    ours = sh.eigenpairs(sh.EmpiricalRisk(model, loss, (x, y)), tol=1e-8)
    theirs = pyhessian.hessian(model, loss, data=(x, y), cuda=False)
    values, _ = theirs.eigenvalues(maxIter=2000, tol=1e-12, top_n=1)
    # It divides its vectors by their length plus 1e-6, and so loses 2e-6 of the value.
    assert ours.lambda_max == pytest.approx(values[0], rel=3e-6)
