"""experiments/gpu_check.py from beginning to end on the CPU, at small sizes."""

import subprocess

import fake_te
import pytest
import torch

from experiments import bench, gpu_check


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The program runs as on a machine without a GPU, and its compiler changes nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that it starts
    monkeypatch.setitem(bench.MODES, "compiled", lambda function: function)
    monkeypatch.setitem(bench.SHAPES, "cpu", ((96, 40),))


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

    head = cells(report[""])
    assert head["GPU"][0].startswith("none") and torch.__version__ in str(head)
    assert all(name in head["seconds of each section"][0] for name in gpu_check.SECTIONS)

    tests = cells(report["The GPU against the CPU"])
    assert len(tests) == 1 + 7 + 4  # a table's head, checks, precisions of Transformer Engine
    assert "not run: no Blackwell" in str(tests["Transformer Engine, nvfp4: a layer of 64 -> 96"])

    steps = cells(report["Speed of SANA 1.6B"])
    assert float(steps["BF16"][1]) == 1 and float(steps["NVFP4, simulated"][0]) > 0
    assert steps["FP8, Transformer Engine"][0].startswith("not run: no GPU with FP8")
    iterations = [name for name in steps if name.startswith(("naive_scaling", "sol_rl"))]
    assert iterations == ["naive_scaling, BF16", "sol_rl, NVFP4, simulated"]

    assert "2 processes over gloo" in str(report["Processes, one on each GPU"])
    memory = report["Peak memory of SANA 1.6B"]
    assert memory[0].startswith("No CUDA") and "| update | nan |" in memory
    assert float(cells(memory)["update"][0]) > float(cells(memory)["explore, simulated"][0]) > 0


def test_an_error_is_a_line_and_the_other_sections_run(tmp_path, monkeypatch):
    def broken(*_):
        yield "before the error"
        raise RuntimeError("CUDA error:\nno kernel | image")

    monkeypatch.setitem(gpu_check.SECTIONS, "tests", ("Broken", broken))
    code, report = run(tmp_path, "tests", "quantization")
    assert code == 1 and list(report) == ["Broken", "Bandwidth of fake_quantize_nvfp4", ""]
    said = [line for line in report["Broken"] if line]
    assert said == ["before the error", "**Failed**: RuntimeError: CUDA error: no kernel / image"]
    assert "(96, 40), compiled" in cells(report["Bandwidth of fake_quantize_nvfp4"])


def test_a_check_that_fails_is_a_row_with_its_figures_and_the_other_checks_run(
    tmp_path, monkeypatch
):
    def wrong(x, *form):
        return gpu_check.quant.quantize_nvfp4(x, *form).dequantize(x.dtype) + (x == x.max())

    monkeypatch.setitem(bench.MODES, "compiled", lambda function: wrong)
    checks = gpu_check.check_fake_quantization, gpu_check.check_noise
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    code, report = run(tmp_path, "tests")
    _, (failed,), *others = cells(report["The GPU against the CPU"]).values()
    assert code == 1 and failed.startswith("**failed**: AssertionError")
    assert "'compiled, torch.float32, ((1, 16), False, False)': '1 of 7200 differ'" in failed
    assert len(others) == 1 + 4 and "**" not in str(others)
    assert "**Failed**: AssertionError: 1 of 6 checks" in report["The GPU against the CPU"]


def test_layers_of_transformer_engine_are_checked_and_timed_where_it_runs(tmp_path, monkeypatch):
    fake_te.install(monkeypatch)
    monkeypatch.setattr(gpu_check, "CHECKS", ())
    code, report = run(tmp_path, "tests", "speed")
    assert code == 0
    tests = cells(report["The GPU against the CPU"])
    agree = "Transformer Engine 2.20.2 agrees with the simulation"
    assert [tests[name] for name in tests if name.startswith("Transformer")] == [[agree]] * 4
    steps = cells(report["Speed of SANA 1.6B"])
    assert float(steps["NVFP4, Transformer Engine"][0]) > 0
    assert len([name for name in steps if name.startswith("sol_rl")]) == 3


def test_an_iteration_is_counted_in_micro_batches():
    """By hand: 48 prompts on 8 GPUs are 6 for each. Sol-RL explores 96 / 24 = 4 micro-batches in 6
    steps, regenerates one in 10, and updates on 24 * 6 / 16 = 9."""
    paper = ["--pretrained", "--prompts", "none", "--device", "cpu"]
    c = gpu_check.train.parse_options(paper)
    seconds = {"bf16": 3.0, "nvfp4": 1.0, "decode": 0.5, "update": 2.0}
    expected = {"explore": 6 * 4 * 6.5, "regenerate": 6 * 30.5, "update": 6 * 9 * 2}
    assert gpu_check.iteration_seconds(c, "sol_rl", seconds) == expected
    expected = {"explore": 6 * 4 * 30.5, "update": 6 * 9 * 2}
    assert gpu_check.iteration_seconds(c, "naive_scaling", seconds) == expected


def test_a_process_that_fails_is_the_error_of_its_section(tmp_path, monkeypatch):
    said = "W1124 torchrun\n[rank1]: Traceback\n[rank1]: DistBackendError: NCCL error\nW1124 end"
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    code, report = run(tmp_path, "processes")
    assert code == 1
    assert "DistBackendError: NCCL error" in report["Processes, one on each GPU"][-1]
