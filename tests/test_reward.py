"""Rewards: what a spec means, what is refused, and that the published ones are the originals'."""

import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import originals
import pytest
import torch
from conftest import PROJECT, error_line
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from originals import snapshot
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

import reward as rewards
from reward import build_reward
from support import preference
from support import world
from support.errors import InputError, NonFinite


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean(dim=(1, 2))\n"
        "def index(images, prompts, metadata):\n    return [m['i'] for m in metadata]\n"
        "def short(images, prompts, metadata):\n    return [1.0]\n"
        "def nan(images, prompts, metadata):\n"
        "    return [float('nan') if p == 'b' else 0.0 for p in prompts]\n"
        "def broken(images, prompts, metadata):\n    raise KeyError('x')\n"
        "def phases(images, prompts, metadata):\n    return [1j, 2j]\n"
        "def huge(images, prompts, metadata):\n    return [3e38, 0.0]\n"
        "def writes(images, prompts, metadata):\n"
        "    prompts.reverse()\n    return images.mul_(0).sum(dim=(1, 2, 3))\n"
    )
    return path


IMAGES = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])


def test_a_function_in_a_file_is_a_reward(mine):
    assert build_reward(f"{mine}:red")(IMAGES, ["a", "b"]).tolist() == [0, 1]


def test_weights_sum_raw_scores_and_metadata_arrives(mine):
    reward = build_reward(f"{mine}:red:0.5,{mine}:index:2")
    assert reward(IMAGES, ["a", "b"], [{"i": 3}, {"i": 4}]).tolist() == [6, 8.5]


@pytest.mark.parametrize(
    "function, message",
    [
        ("short", r"shape \(1,\)"),
        ("phases", "prompt 'a' raised ValueError: its scores are complex"),
        ("broken", "prompt 'a' raised KeyError"),
    ],
)
def test_scores_that_cannot_be_used_name_the_prompt(mine, function, message):
    with pytest.raises(InputError, match=message):
        build_reward(f"{mine}:{function}")(IMAGES, ["a", "b"])


def test_a_score_that_is_not_finite_names_the_reward_and_the_prompt(mine):
    with pytest.raises(NonFinite, match="NaN or infinity in the reward mine.py:nan.*'b'") as error:
        build_reward(f"{mine}:nan")(IMAGES, ["a", "b"])
    assert (error.value.what, error.value.prompt) == ("reward mine.py:nan", "b")


def test_a_reward_that_writes_into_its_arguments_changes_nothing_else(mine):
    scores = build_reward(f"{mine}:writes,{mine}:red").scores(images := IMAGES.clone(), ["a", "b"])
    assert scores["mine.py:red"].tolist() == [0, 1] and torch.equal(images, IMAGES)


def test_a_sum_that_overflows_is_an_error(mine):
    with pytest.raises(NonFinite, match="NaN or infinity in the reward weighted_sum.*'a'"):
        build_reward(f"{mine}:huge:2")(IMAGES, ["a", "b"])


@pytest.mark.parametrize(
    "spec",
    ["nothing", "", "clipscore,", "none.py:f", "clipscore:1:2", "x:nan", "clipscore:0"],
)
def test_unknown_specs_are_refused_before_any_weights_are_loaded(spec):
    with pytest.raises(InputError, match="--reward"):
        build_reward(spec)


def test_a_missing_function_is_refused(mine):
    with pytest.raises(InputError, match="no function blue"):
        build_reward(f"{mine}:blue")


def test_a_file_that_misses_another_is_not_itself_called_missing(tmp_path):
    (tmp_path / "mine.py").write_text("open('/nowhere/vocabulary.txt')\n")
    with pytest.raises(InputError, match="mine.py fails to import: FileNotFoundError.*vocabulary"):
        build_reward(f"{tmp_path / 'mine.py'}:f")


@pytest.fixture(scope="module")
def clipscore():
    return build_reward("clipscore", clip=world.TINY / "clip")


def test_clipscore_prefers_the_right_prompt_and_the_undamaged_picture(clipscore):
    from experiments.pretrain_world import degrade

    g = torch.Generator().manual_seed(3)
    prompts = list(world.HELD_OUT_PROMPTS) * 4
    good = world.draw(prompts, g)
    right = clipscore(good, prompts)
    # Both are 0.89 to 0.96, a little different on each machine, and 0.5 +- 0.03 by chance.
    assert (right > clipscore(good, prompts[1:] + prompts[:1])).float().mean() > 0.8
    assert (right > clipscore(degrade(good, g), prompts)).float().mean() > 0.8


def test_clipscore_reads_every_word_of_a_caption(clipscore):
    """CLIP's text tower pools at <eos>; pooled anywhere else it would not see what follows."""
    image = torch.full((1, 3, 32, 32), 0.5)
    caption = "a small plain red ring at the top".split()
    whole = clipscore(image, [" ".join(caption)])
    for i in range(1, len(caption)):
        changed = caption[:i] + ["cross"] + caption[i + 1 :]
        # 0.004 at least; rounding, which other lengths change too, is 1e-7.
        assert abs(clipscore(image, [" ".join(changed)]) - whole) > 1e-4, changed


def test_clipscore_does_not_depend_on_the_batch(clipscore):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a small plain red ring at the top", "x", "", "日本", "y " * 100]
    together = clipscore(images, prompts)
    alone = torch.cat([clipscore(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Preprocessing


@given(h=st.integers(1, 90), w=st.integers(1, 90), side=st.integers(1, 60), seed=st.integers(0, 99))
@example(h=112, w=150, side=224, seed=0)  # many values lie halfway between two 8-bit values
@settings(max_examples=60, deadline=None)
def test_resize_and_crop_is_pillows_to_the_last_bit(h, w, side, seed):
    pixels = np.random.RandomState(seed).randint(0, 256, (h, w, 3), dtype=np.uint8)
    size = int(side * w / min(h, w)), int(side * h / min(h, w))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    # In two steps, since from its version 13 Pillow now and then goes along y first.
    whole = Image.fromarray(pixels).resize((size[0], h), Image.Resampling.BICUBIC)
    whole = whole.resize(size, Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + side, top + side)))
    ours = preference.resize_and_crop(tensor(pixels), side, int)[0].permute(1, 2, 0)
    assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("preprocess", [preference.clip_pixels, preference.square_pixels])
def test_images_stay_on_their_device(preprocess):
    """A tensor on the device "meta" has no values; to copy it to the CPU is an error."""
    pixels = preprocess(torch.empty(2, 3, 48, 81, device="meta"), 32)
    assert pixels.shape == (2, 3, 32, 32) and pixels.device.type == "meta"


def test_hpsv2_sees_the_whole_picture_between_black_bars():
    black = (0 - np.array(preference.OPENAI_CLIP_MEAN)) / np.array(preference.OPENAI_CLIP_STD)
    pixels = preference.square_pixels(torch.ones(1, 3, 16, 64), 32)[0]
    assert pixels.shape == (3, 32, 32)
    for line in (0, 11, 20, 31):  # 8 lines of picture, from 12 to 19
        assert torch.allclose(pixels[:, line, 5].double(), torch.tensor(black)), line
    assert (pixels[:, 12:20] > 1.5).all()


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2", "imagereward"])
def test_odd_images_get_a_score_or_a_clear_error(name, hub, small):
    reward = build_reward(name)
    for shape in ((1, 1), (1, 300), (300, 1), (32, 32)):
        assert torch.isfinite(reward(torch.full((1, 3, *shape), 0.5), ["grey"])), shape
    for value in (float("nan"), 1.001, -0.001):
        image = torch.full((2, 3, 8, 8), 0.5)
        image[1, 2, 3, 4] = value
        with pytest.raises(InputError, match="'second' has pixels outside"):
            reward(image, ["first", "second"])
    with pytest.raises(InputError, match=r"2 images \(3, H, W\) to score, not \(2, 1, 8, 8\)"):
        reward(torch.zeros(2, 1, 8, 8), ["a", "b"])


# ---------------------------------------------------------------------------------------------
# The published rewards, as small networks of random weights, against what their own code gave


SCORES = json.loads(originals.STORED.read_text())
PUBLISHED = tuple(SCORES["scores"])


def clip_config(act):
    shape = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2)
    words = dict(vocab_size=len(SCORES["clip_vocabulary"]), eos_token_id=2)  # as published
    return CLIPConfig(
        text_config=shape | words | dict(hidden_act=act),
        vision_config=shape | dict(image_size=32, patch_size=8, hidden_act=act),
        projection_dim=48,
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A cache of the hub with the originals' checkpoints, under their names, in their formats."""
    root = tmp_path_factory.mktemp("hub")
    states = {
        name: {k: torch.tensor(v) for k, v in originals.weights(shapes, seed).items()}
        for seed, (name, shapes) in enumerate(SCORES["shapes"].items())
    }

    for name, act in (("clipscore", "quick_gelu"), ("pickscore", "gelu")):
        folder = snapshot(root, originals.HUB[name])
        clip_config(act).save_pretrained(folder)
        save_file(states[name], folder / "model.safetensors", metadata={"format": "pt"})
    laion = snapshot(root, preference.CLIP_H)
    clip_config("gelu").save_pretrained(laion)
    for folder in (snapshot(root, originals.HUB["clipscore"]), laion):
        originals.clip_files(folder, SCORES["clip_vocabulary"], SCORES["clip_merges"])
    vocabulary = snapshot(root, preference.ImageReward.bert) / "vocab.txt"
    vocabulary.write_text("\n".join(SCORES["bert_vocabulary"]), encoding="utf-8")
    for cls, saved in (
        (preference.HPSv2, {"epoch": 1, "state_dict": states["hpsv2"]}),
        (preference.ImageReward, states["imagereward"]),
    ):
        torch.save(saved, snapshot(root, cls.repository) / cls.file)
    return root


@pytest.fixture
def use_cache(monkeypatch):
    """A function that makes a folder the hub's cache. The hub itself is never asked."""

    def unreachable(repository, timeout):
        assert timeout <= 5
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("support.hub.model_info", unreachable)
    return lambda root: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))


@pytest.fixture
def hub(checkpoints, use_cache):
    use_cache(checkpoints)
    return checkpoints


@pytest.fixture
def small(monkeypatch):
    """ImageReward's sizes, which its checkpoint does not tell, made those of the stand-in."""
    same = dict(num_hidden_layers=2, num_attention_heads=4)
    vision = same | dict(hidden_size=96, intermediate_size=384, image_size=32, patch_size=8)
    text = same | dict(hidden_size=64, intermediate_size=128, max_position_embeddings=64)
    text |= dict(vocab_size=len(SCORES["bert_vocabulary"]) + 2, encoder_hidden_size=96)
    for name, sizes in (("vision_config", vision), ("text_config", text)):
        published = getattr(preference.ImageReward, name)
        monkeypatch.setattr(preference.ImageReward, name, published | sizes)


def tensor(picture):
    return torch.tensor(picture).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_reward_is_its_originals_function(name, hub, small):
    """Portrait and landscape, noise and grey, empty, long and non-Latin prompts."""
    reward, scale = build_reward(name), {"pickscore": 1 / 26}.get(name, 1)
    expected = torch.tensor(SCORES["scores"][name]) * scale
    for picture, row in zip(originals.images(), expected):
        images = tensor(picture).expand(len(originals.PROMPTS), -1, -1, -1)
        scores = reward(images, originals.PROMPTS)
        torch.testing.assert_close(scores, row, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_reward_scores_the_picture_that_would_be_saved(name, hub, small):
    reward = build_reward(name)
    images = tensor(originals.images()[0])
    nearly = (images + 0.4 / 255).clamp(max=1)  # the same in 8 bits
    assert torch.equal(reward(images, ["a"]), reward(nearly, ["a"]))


def test_hpsv2_cleans_its_prompts(hub):
    reward, image = build_reward("hpsv2"), torch.rand(1, 3, 32, 32)
    assert reward(image, ["  caf\u00c3\u00a9 &amp;amp; b "]) == reward(image, ["caf\u00e9 & b"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_saved_in_half_precision_are_computed_with_in_float32(
    name, hub, small, tmp_path, use_cache
):
    images = torch.rand(2, 3, 40, 32)
    single = build_reward(name)(images, ["a", "b"])
    root, cls = tmp_path / "hub", rewards.PUBLISHED[name]
    shutil.copytree(hub, root)
    path = snapshot(root, cls.repository) / cls.file
    whole = path.suffix == ".safetensors"
    load, save = (load_file, save_file) if whole else (torch.load, torch.save)
    saved = load(path)
    state = saved.get("state_dict", saved)
    state |= {name: value.half() for name, value in state.items()}
    save(saved, path, *([{"format": "pt"}] if whole else []))
    use_cache(root)
    half = build_reward(name)
    assert {p.dtype for p in vars(half.parts[0][2]).get("clip", half.parts[0][2]).parameters()} == {
        torch.float32
    }
    torch.testing.assert_close(half(images, ["a", "b"]), single, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_reward_does_not_depend_on_the_batch(name, hub, small):
    reward, images = build_reward(name), torch.rand(6, 3, 40, 32)
    together = reward(images, originals.PROMPTS)
    alone = [reward(images[i : i + 1], [p]) for i, p in enumerate(originals.PROMPTS)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("hpsv2", "missing", "missing key"),
        ("hpsv2", "unexpected", "unexpected key more"),
        ("hpsv2", "pickle", "[Ww]eights.only"),
        ("imagereward", "missing", "Missing key"),
        ("imagereward", "unexpected", "Unexpected key"),
        ("imagereward", "pickle", "[Ww]eights.only"),
        ("imagereward", "cut", "PytorchStreamReader failed"),
        ("pickscore", "missing", "missing key"),
        ("pickscore", "unexpected", "unexpected key more"),
        ("pickscore", "cut", "SafetensorError|incomplete|deserializ"),
        ("clipscore", "gone", "hf download openai/clip-vit-large-patch14 --include '[*].json' "),
        ("hpsv2", "gone", "hf download xswu/HPSv2 --include 'HPS_v2.1_compressed.pt'; then copy"),
        ("imagereward", "empty", "no .*ImageReward.pt; .*: hf download THUDM/ImageReward "),
    ],
)
def test_weights_that_are_not_the_rewards_are_refused_in_a_line(
    name, damage, says, hub, small, tmp_path, capfd, use_cache
):
    build_reward(name)  # whatever packages say when they are first used
    capfd.readouterr()
    root, cls = tmp_path / "hub", rewards.PUBLISHED[name]
    shutil.copytree(hub, root)
    use_cache(root)
    path = snapshot(root, cls.repository) / cls.file
    if damage == "gone":
        shutil.rmtree(path.parent.parent.parent)
    elif damage == "empty":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        load, save = (load_file, save_file) if name == "pickscore" else (torch.load, torch.save)
        saved = load(path)
        state = saved.get("state_dict", saved)
        if damage == "missing":
            del state[next(key for key in state if "layer" in key or "resblock" in key)]
        else:
            state["more"] = torch.zeros(1) if damage == "unexpected" else Runs(tmp_path / "ran")
        save(saved, path)
    with pytest.raises(InputError, match=says) as error:
        build_reward(name)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--reward {name}: ")
    assert not (tmp_path / "ran").exists()
    assert capfd.readouterr().err == ""  # libraries have nothing to add


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_without_the_hub_a_published_reward_says_what_would_do(tmp_path, use_cache):
    use_cache(tmp_path)  # which asserts that the hub is asked for 5 seconds only
    with pytest.raises(InputError, match="hf download yuvalk.*HF_HUB_OFFLINE=1.*Name or service"):
        preference.fetch(preference.PickScore.repository, ("config.json",))
    with pytest.raises(InputError, match="--reward pickscore: .*hf download .*HF_HUB_OFFLINE=1"):
        build_reward("pickscore")


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_the_hub_only_its_cache_is_asked(name, hub, small, monkeypatch):
    def cache(repository, local_files_only, **options):
        assert local_files_only, "a download would ask again and again"
        return snapshot_download(repository, local_files_only=local_files_only, **options)

    monkeypatch.setattr("support.hub.snapshot_download", cache)
    assert torch.isfinite(build_reward(name)(torch.rand(1, 3, 32, 32), ["a"]))


def test_what_the_hub_refuses_is_said_by_the_download(monkeypatch):
    class Refused(HfHubHTTPError):
        def __init__(self, says):
            Exception.__init__(self, says)

    def refuse(repository, timeout):
        raise Refused("401")

    def download(repository, allow_patterns, local_files_only):
        assert not local_files_only
        raise Refused("gated: ask for access")

    monkeypatch.setattr("support.hub.model_info", refuse)
    monkeypatch.setattr("support.hub.snapshot_download", download)
    with pytest.raises(InputError, match="gated: ask for access"):
        build_reward("imagereward")


def test_a_file_is_executed_once_and_may_hold_dataclasses(tmp_path):
    (tmp_path / "count.py").write_text(
        "from __future__ import annotations\nimport dataclasses, pathlib\n"
        "with open(pathlib.Path(__file__).with_name('log'), 'a') as log: log.write('x')\n"
        "@dataclasses.dataclass\nclass A:\n    x: int = 0\n"
        "def f(i, p, m): return [1.0] * len(p)\n"
        "def g(i, p, m): return [2.0] * len(p)\n"
    )
    path = tmp_path / "count.py"
    assert build_reward(f"{path}:f,{path}:g")(IMAGES, ["a", "b"]).tolist() == [3, 3]
    build_reward(f"{path}:f")
    assert (tmp_path / "log").read_text() == "x"


# ---------------------------------------------------------------------------------------------
# The command line, and a service of one's own


def picture(path, size=(40, 30)):
    Image.new("RGB", size, "red").save(path)
    return str(path)


def test_reward_alone_scores_picture_files(hub, tmp_path, capsys):
    files = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (30, 60))]
    options = [*files, "--prompt", "a red ring"]
    assert rewards.main([*options, "--reward", "pickscore,hpsv2:2"]) == 0
    names, *rows = capsys.readouterr().out.splitlines()
    assert names.split() == ["pickscore", "hpsv2", "weighted_sum"] and len(rows) == 2
    for row, file in zip(rows, files):
        *scores, path = row.split()
        first, second, both = map(float, scores)
        assert path == file and both == pytest.approx(first + 2 * second, abs=2e-4)
    assert rewards.main([files[0], "--prompt", "a small plain red ring at the top", "--tiny"]) == 0
    assert "clipscore" in capsys.readouterr().out


def test_reward_alone_says_what_is_wrong_in_a_line(tmp_path, capsys, hub):
    (tmp_path / "no.png").write_text("not a picture")
    (tmp_path / "quits.py").write_text(
        "import sys\ndef f(i, p, m): sys.exit(0)\ndef nan(i, p, m): return [float('nan')]\n"
    )
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "deep.png")
    good = picture(tmp_path / "a.png")
    for options in (
        [str(tmp_path / "no.png"), "--prompt", "x"],
        [str(tmp_path / "absent.png"), "--prompt", "x"],
        [good, "--prompt", "x", "--reward", "nothing"],
        [good, "--prompt", "x", "--device", "cuda:99"],
        [str(tmp_path / "deep.png"), "--prompt", "x"],
        [good, "--prompt", "x", "--reward", f"{tmp_path / 'quits.py'}:f"],
        [good, "--prompt", "x", "--reward", f"{tmp_path / 'quits.py'}:nan"],
    ):
        assert rewards.main(options) == 2, options
        assert error_line(capsys.readouterr().err, "reward.py"), options
    for options in ([good], [good, "--prompt", "x", "--rewrad", "y"]):
        with pytest.raises(SystemExit) as end:
            rewards.main(options)
        assert end.value.code == 2, options
        assert error_line(capsys.readouterr().err, "reward.py"), options


def test_reward_alone_tells_of_the_tiny_models_where_clipscore_cannot_be_fetched(
    tmp_path, capsys, use_cache
):
    use_cache(tmp_path)
    assert rewards.main([picture(tmp_path / "a.png"), "--prompt", "x"]) == 2
    error = error_line(capsys.readouterr().err, "reward.py")
    assert "hf download openai/clip-vit-large-patch14" in error and "--tiny" in error


class Service(BaseHTTPRequestHandler):
    """Scores are the lengths of the prompts; before that it does what `trouble` lists."""

    trouble, asked = [], 0

    def do_POST(self):
        type(self).asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert len(body["images"]) == len(body["prompts"])
        what = self.trouble.pop(0) if self.trouble else "fine"
        if what == "hangs":
            time.sleep(1)
        answer = {
            "garbage": b"<html>",
            "empty": b"",
            "no scores": b'{"error": "busy"}',
            "words": b'{"scores": ["high", "low"]}',
            "too few": b'{"scores": [1]}',
        }.get(what, json.dumps({"scores": [len(p) for p in body["prompts"]]}).encode())
        self.send_response(503 if what == "fails" else 200)
        self.send_header("Content-Length", str(len(answer) + (what == "cut") * 10))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def service(tmp_path):
    """The reward of docs/rewards.md that asks a service, and a service for it."""
    page = (PROJECT / "docs" / "rewards.md").read_text()
    code = re.search(r"```python\n([^`]*def ask\([^`]*)```", page)
    server = ThreadingHTTPServer(("localhost", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.trouble, Service.asked = [], 0
    (tmp_path / "service.py").write_text(
        code[1]
        + f"URL = 'http://localhost:{server.server_port}'\nTIMEOUT, WAITS = 0.3, (0.01, 0.01)"
    )
    yield build_reward(f"{tmp_path / 'service.py'}:ask")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("what", ["fails", "hangs", "garbage", "empty", "no scores", "cut"])
def test_the_readmes_service_is_asked_again_and_then_given_up(service, what):
    Service.trouble = [what, what]
    assert service(IMAGES, ["four", "seven"]).tolist() == [4, 5] and Service.asked == 3
    Service.trouble = [what] * 9
    with pytest.raises(InputError, match="ask for prompt 'four' raised"):
        service(IMAGES, ["four", "seven"])
    assert Service.asked == 6


def test_a_service_that_answers_with_other_things_is_an_error(service):
    for what in ("words", "too few"):
        Service.trouble = [what]
        with pytest.raises(InputError, match="raised|shape"):
            service(IMAGES, ["four", "seven"])
