"""--precision tf32 and bfloat16: what is refused, what is stored apart, and what `check` prints."""

import pytest
import torch

from influence_cli.api import devices, opening
from influence_cli.cache.identity import Settings
from influence_cli.gradients.tf32 import allow_tf32, without_tf32


def tf32_flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def restored():
    before = tf32_flags()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tf32_is_refused_on_a_device_without_it(make_run, influence):
    result = influence("score", make_run(), "--device", "cpu", "--precision", "tf32")
    assert result.code == 2
    assert "--precision tf32: cpu does not multiply in TF32" in result.err


def test_tf32_is_refused_on_an_older_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(Exception, match="does not multiply in TF32"):
        devices.check_tf32(True, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    devices.check_tf32(True, torch.device("cuda"))


def test_tf32_is_off_although_pytorch_and_the_definition_allow_it(make_run, influence):
    run = make_run()
    definition = run / "definition.py"
    definition.write_text(
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\n"
        "torch.backends.cudnn.allow_tf32 = True\n" + definition.read_text()
    )
    assert influence("score", run, "--cache", "none").code == 0
    assert tf32_flags() == (False, False)


def test_tf32_is_on_where_the_user_asks(make_run, influence, monkeypatch):
    monkeypatch.setattr(opening, "check_tf32", lambda tf32, device: None)
    result = influence("score", run := make_run(), "--precision", "tf32")
    assert result.code == 0
    assert tf32_flags() == (True, True)
    assert [path.name for path in (run / ".influence").glob("*-stored-*")] == [
        "tf32-stored-float32-exact"
    ]
    assert "gradients are computed in tf32: a gradient differs from float32 by" in result.err


def test_check_compares_ways_to_compute_without_tf32(make_run, influence, monkeypatch):
    monkeypatch.setattr(opening, "check_tf32", lambda tf32, device: None)
    seen = []
    from influence_cli.diagnostics import gradient_check

    original = gradient_check.check_gradients

    def look(*arguments):
        seen.append(tf32_flags())
        return original(*arguments)

    monkeypatch.setattr(gradient_check, "check_gradients", look)
    result = influence("check", make_run(), "--precision", "tf32", "--cache", "none")
    assert result.code == 0
    assert seen == [(False, False)]
    assert [row["error"] for row in result.rows if row["check"] == "precision"] == ["0.0"]


def test_a_block_without_tf32_ends_as_it_began():
    allow_tf32(True)
    with without_tf32(True):
        assert tf32_flags() == (False, False)
    assert tf32_flags() == (True, True)


def test_check_prints_the_error_of_bfloat16_and_refuses_noise(make_run, influence, monkeypatch):
    run = make_run()
    result = influence("check", run, "--precision", "bfloat16", "--cache", "none")
    (row,) = [row for row in result.rows if row["check"] == "precision"]
    assert 1e-4 < float(row["error"]) < float(row["allowed"])
    assert result.code == 0
    exact = influence("check", run, "--precision", "float32", "--cache", "none")
    assert not [row for row in exact.rows if row["check"] == "precision"]

    from influence_cli.diagnostics import gradient_check

    monkeypatch.setattr(gradient_check, "MOST_ROUNDING", 1e-5)
    refused = influence("check", run, "--precision", "bfloat16", "--cache", "none")
    assert refused.code == 1
    assert "these gradients are mostly rounding error: use --precision float32" in refused.err
    assert "do not trust" not in refused.err


def test_tf32_allows_the_rounding_of_its_ten_bits():
    exact = Settings(torch.float32, torch.float32)
    coarse = Settings(torch.float32, torch.float32, tf32=True)
    assert coarse.rounding == 8 * 2**-10 > exact.rounding
    assert coarse.key != exact.key
