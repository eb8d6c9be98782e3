"""`relfisher plan`: what it prints, and what it says of wrong arguments."""

import sys

import pytest
from commands import call


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of the working directory that makes models."""
    lines = [
        "import torch",
        "def bare(): return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))",
        "def with_inputs(): return torch.nn.Embedding(9, 3), torch.tensor([1, 2])",
        "def tokens(): return torch.nn.Sequential(torch.nn.Embedding(9, 3), torch.nn.Linear(3, 2))",
        "def images(): return torch.nn.BatchNorm2d(3)",
        "def nothing(): return 3",
        "def triple(): return bare(), torch.ones(5, 6), 3",
        "def sized(width): return torch.nn.Linear(width, width)",
        "def broken(): raise KeyError('weights.pt')",
        "def failing(): return torch.nn.Sequential(torch.nn.Linear(6, 4), Failing())",
        "def unfit(): return bare(), torch.ones(5, 7)",
        "def leaving(): raise SystemExit(3)",
        "def huge(): return torch.nn.Linear(10**9, 10**9)",
        "class Failing(torch.nn.Module):",
        "    def forward(self, x): raise KeyError('absent')",
        "def softmax(z): return -z.log_softmax(-1)[:, 0].mean()",
        "def raising(z): return 1 / 0",
        "def none(z): return None",
        "def vector(z): return z",
        "def detached(z): return z.detach().mean()",
        "def infinite(z): return z.mean() * float('inf')",
        "def number_of(z): return 0.5",
        "def whole(z): return z.argmax()",
        "def of_two(z, target): return z.mean()",
        "number = 3",
    ]
    (tmp_path / "factories.py").write_text("\n".join(lines))
    (tmp_path / "unreadable.py").write_text("def")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("factories", None)


@pytest.mark.usefixtures("factories")
def test_plan_prints_a_row_a_layer(capsys):
    assert call(["plan", "--model", "factories:bare", "--inputs", "5x6"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split()[:4] == ["0", "4x7", "TanhBernoulli", "diagonal"]
    assert rows[2].split()[:4] == ["2", "2x5", "LinearGaussian", "shared"]
    assert call(["plan", "--model", "factories:bare", "--inputs", "5x6", "--loss", "factories:softmax"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].split()[:6] == ["2", "2x5", "LinearGaussian,", "softmax", "head", "kronecker"]
    assert call(["plan", "--model", "factories:bare", "--inputs", "5x6", "--world-size", "2"]) == 0
    assert "2 processes that share out the work" in capsys.readouterr().out
    for mesh, world in (("2x2", []), ("4", ["--world-size", "4"])):
        assert call(["plan", "--model", "factories:bare", "--inputs", "5x6", "--mesh", mesh, *world]) == 0
        assert "4 processes that share out the work" in capsys.readouterr().out
    assert call(["plan", "--model", "factories:bare", "--inputs", "5x6", "--state-bytes", "1.5x adam"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:4] == ["2", "2x5", "LinearGaussian", "diagonal"]
    assert call(["plan", "--model", "factories:with_inputs"]) == 0
    assert "diagonal" in capsys.readouterr().out
    assert call(["plan", "--model", "factories:tokens", "--inputs", "4x5:9"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["0", "3x9", "LinearGaussian", "diagonal"]


@pytest.mark.usefixtures("factories")
def test_plan_limits_samples_as_the_optimizer_does(capsys):
    for options, operations in (
        ([], "12.8 kFLOP"),
        (["--samples", "0"], "25.6 kFLOP"),
        (["--samples", "100"], "5 kFLOP"),
    ):
        assert call(["plan", "--model", "factories:bare", "--inputs", "512x6", *options]) == 0
        assert f"  {operations}  " in capsys.readouterr().out.splitlines()[2]


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "factories"], "'factories' is not of the form MODULE:NAME"),
        (["--model", "factories:number"], "'--model': factories:number must be callable, got int"),
        (["--model", "factories:bare", "--inputs", "5x6", "--loss", "factories:absent"], "has no attribute 'absent'"),
        (["--model", "absent:bare"], "No module named 'absent'"),
        (["--model", "factories:absent"], "has no attribute 'absent'"),
        (["--model", "factories:nothing"], "must return a torch.nn.Module or (model, inputs), got int"),
        (
            ["--model", "factories:triple"],
            "or (model, inputs), got (Sequential, Tensor, int)",
        ),
        (
            ["--model", "factories:sized"],
            "factories:sized, called without arguments, raised TypeError: sized()",
        ),
        (["--model", "factories:broken"], "'--model': factories:broken, called without arguments, raised KeyError"),
        (["--model", "unreadable:bare"], "'--model': importing unreadable raised SyntaxError"),
        (["--model", "factories:bare"], "returns no inputs: give the shape of a batch"),
        (["--model", "factories:bare", "--inputs", "5,6"], "'5,6' is not a shape"),
        (["--model", "factories:bare", "--inputs", "5x6:0"], "'5x6:0' is not a shape"),
        (["--model", "factories:bare", "--inputs", "5x6:"], "such as 4x9:100"),
        (["--model", "factories:bare", "--inputs", "5x7"], "the model cannot be called with them"),
        (["--model", "factories:tokens", "--inputs", "5x7"], "with :N for whole numbers below N, or let the factory"),
        (["--model", "factories:tokens", "--inputs", "5x7:10"], "index out of range in self; give the shape it takes"),
        (["--model", "factories:tokens", "--inputs", "1x1:10"], "index out of range in self; give the shape it takes"),
        (
            ["--model", "factories:images", "--inputs", "5x7"],
            "'--inputs': the model cannot be called with them: ValueError: expected 4",
        ),
        (["--model", "factories:bare", "--inputs", "5x6", "--structure", "kron"], "structure must be one of"),
        (["--model", "factories:leaving"], "factories:leaving, called without arguments, raised SystemExit: 3"),
        (["--model", "factories:huge"], "factories:huge, called without arguments, raised RuntimeError"),
        (["--model", "factories:unfit"], "'--model': the model cannot be called with the inputs that factories:unfit"),
        (["--model", "factories:failing", "--inputs", "5x6"], "cannot be called with them: KeyError: 'absent'"),
        (["--model", "factories:bare", "--inputs", "9" * 9 + "x6"], "GiB that are free on cpu; give a smaller one"),
        (["--model", "factories:bare", "--inputs", "9" * 30 + "x6"], "is not a shape"),
        (["--model", "factories:bare", "--inputs", "9" * 5000], "is not a shape"),
        (["--model", "factories:bare", "--inputs", "5x6:" + "9" * 30], "is not a shape"),
        (["--model", "factories:bare", "--inputs", "x".join("2" * 9)], "up to 8 whole numbers"),
        (["--model", "factories:bare", "--mebibytes", "0"], "'--mebibytes': '0' is not a whole number from 1 to"),
        (["--model", "factories:bare", "--inputs", "5x6", "--state-bytes", "many"], "bytes, or such as '1x adam', got"),
        (
            ["--model", "factories:bare", "--inputs", "5x6", "--state-bytes", "9"],
            "'--state-bytes': state_bytes must be",
        ),
        (["--model", "factories:bare", "--inputs", "5x6", "--mesh", "2x2x2"], "'--mesh': '2x2x2' is not a number of"),
        (
            ["--model", "factories:bare", "--inputs", "5x6", "--mesh", "2x2", "--world-size", "3"],
            "'--mesh': '2x2' is not a number of processes, or two joined by x",
        ),
        (["--model", "factories:bare", "--samples", "-1"], "'--samples': '-1' is not a whole number from 0 to"),
    ],
)
def test_plan_explains_wrong_arguments(capsys, arguments, message):
    assert call(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("raising", "ZeroDivisionError: division by zero"),
        ("none", "it must return a scalar tensor with a floating-point dtype, got NoneType None"),
        ("number_of", "it must return a scalar tensor with a floating-point dtype, got float 0.5"),
        ("whole", "it must return a scalar tensor with a floating-point dtype, got a tensor of torch.int64"),
        ("vector", "it must return one finite number, got a tensor of shape [5, 2]"),
        ("infinite", "it must return one finite number, got"),
        ("detached", "it must return a tensor computed from the model's output, got one without a gradient"),
        ("of_two", "missing 1 required positional argument: 'target'"),
    ],
)
def test_plan_blames_the_loss_for_what_it_does(capsys, loss, message):
    assert call(["plan", "--model", "factories:bare", "--inputs", "5x6", "--loss", f"factories:{loss}"]) == 2
    error = capsys.readouterr().err
    assert f"'--loss': factories:{loss}, called with the model's output: " in error
    assert message in error
    assert error.count("\n") == 1
