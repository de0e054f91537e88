"""experiments/gpu_check.py from beginning to end on the CPU, at small sizes."""

import subprocess

import fake_te
import pytest
import torch

from experiments import bench, gpu_check

QUANTIZATION = gpu_check.SECTIONS["quantization"][0]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The program runs as on a machine without a GPU, and its compiler changes nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that it starts
    monkeypatch.setitem(bench.MODES, "compiled", lambda function: function)
    monkeypatch.setitem(bench.SHAPES, "cpu", ((96, 48),))
    monkeypatch.setattr(gpu_check, "LAYER", (64, 96))


def run(tmp_path, *sections):
    """(exit code, {title of a section, or "" for the head: its lines}) of the report."""
    output = tmp_path / "gpu.md"
    code = gpu_check.main([*sections, "--output", str(output)])
    head, *rest = output.read_text().split("\n## ")
    texts = {text.partition("\n")[0]: text.splitlines()[2:] for text in rest}
    return code, texts | {"": head.splitlines()}


def cells(lines):
    """{first cell: the other cells} of the rows of all tables of a section, with their heads."""
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {name: rest for name, *rest in table}


def test_every_section_runs_or_says_why_it_cannot(tmp_path):
    code, report = run(tmp_path)
    assert code == 0 and "**" not in str(report)
    assert list(report) == [title for title, _ in gpu_check.SECTIONS.values()] + [""]

    assert report[""][2].startswith("- GPU: none") and torch.__version__ in str(report[""])
    assert all("This section took" in report[title][-1] for title, _ in gpu_check.SECTIONS.values())

    tests = cells(report["The GPU against the CPU"])
    assert len(tests) == 2 + 5 + 4  # a table's head, checks, precisions of a layer
    assert "Transformer Engine not run: no Blackwell" in str(tests)

    memory = cells(report["Peak memory of SANA 1.6B; the goal is within 10% of the dry run"])
    assert list(memory)[2:] == ["explore", "regenerate", "decode", "update"]
    assert float(memory["update"][1]) > float(memory["explore"][1]) > 0

    assert "2 processes over gloo" in str(report["Processes, one on each GPU"])

    speed = cells(report["Speed of SANA 1.6B"])
    assert float(speed["bf16: PyTorch, eager"][1]) == 1
    simulated = "nvfp4: simulated (no Blackwell: this is cpu), compiled"
    assert float(speed[simulated][0]) > 0
    iterations = [name for name in speed if name.startswith(("naive_scaling", "sol_rl"))]
    assert len(iterations) == 2 * 3
    assert speed["naive_scaling, bf16, eager"][-1] == "1.00"


def test_an_error_is_a_line_and_the_other_sections_run(tmp_path, monkeypatch):
    def broken(*_):
        yield "before the error"
        raise RuntimeError("CUDA error:\nno kernel | image")

    monkeypatch.setitem(gpu_check.SECTIONS, "tests", ("Broken", broken))
    code, report = run(tmp_path, "tests", "quantization")
    assert code == 1 and list(report) == ["Broken", QUANTIZATION, ""]
    said = [line for line in report["Broken"] if line]
    error = "**failed**: RuntimeError: CUDA error: no kernel / image"
    assert said[:-1] == ["before the error", error]
    assert "(96, 48), compiled" in cells(report[QUANTIZATION])


def test_a_check_that_fails_is_a_row_with_its_figures_and_the_other_checks_run(
    tmp_path, monkeypatch
):
    def wrong(x, *form):
        return gpu_check.quant.quantize_nvfp4(x, *form).dequantize(x.dtype) * (1 + (x == x.max()))

    monkeypatch.setitem(bench.MODES, "compiled", lambda function: wrong)
    checks = gpu_check.check_quantization, gpu_check.check_reference
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    code, report = run(tmp_path, "tests")
    _, _, (failed,), *others = cells(report["The GPU against the CPU"]).values()
    expected = "compiled with ((1, 16), False, False): 1 of 2232000 differ"
    assert code == 1 and failed == f"**failed**: AssertionError: {expected}"
    assert len(others) == 1 + 4 and "**" not in str(others)


def test_transformer_engine_is_checked_and_timed_where_it_runs(tmp_path, monkeypatch):
    fake_te.install(monkeypatch)
    monkeypatch.setattr(gpu_check, "CHECKS", ())
    code, report = run(tmp_path, "tests", "speed")
    assert code == 0
    assert str(report["The GPU against the CPU"]).count("Transformer Engine 2.20.2 agrees") == 4
    speed = cells(report["Speed of SANA 1.6B"])
    assert float(speed["nvfp4: Transformer Engine 2.20.2 on sm100, eager"][0]) > 0


def test_an_iteration_is_counted_in_micro_batches():
    """By hand: 48 prompts on 8 GPUs are 6 for each. Sol-RL explores 96 / 24 = 4 micro-batches in 6
    steps, regenerates one in 10, and updates on 24 * 6 / 16 = 9."""
    paper = ["--pretrained", "--prompts", "none", "--device", "cpu"]
    c = gpu_check.train.parse_options(paper)
    seconds = dict(bf16=3.0, decode=0.5, update=2.0)
    expected = 6 * 4 * 6.5, 6 * 30.5, 6 * 9 * 2
    assert gpu_check.iteration_seconds(c, explorer=1.0, **seconds) == expected
    expected = 6 * 4 * 30.5, 0, 6 * 9 * 2
    assert gpu_check.iteration_seconds(c, explorer=None, **seconds) == expected


def test_a_process_that_fails_is_the_error_of_its_section(tmp_path, monkeypatch):
    said = "W1124 torchrun\n[rank1]: Traceback\n[rank1]: DistBackendError: NCCL error\nW1124 end"
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    code, report = run(tmp_path, "processes")
    assert code == 1
    assert "DistBackendError: NCCL error" in str(report["Processes, one on each GPU"])
