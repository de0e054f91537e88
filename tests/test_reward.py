"""Rewards: what a spec means, what is refused, and that the published ones are the originals'."""

import copy
import functools
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import originals
import pytest
import torch
from conftest import PROJECT, error_line
from huggingface_hub import errors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from safetensors.torch import save_file

import reward as rewards
from reward import build_reward
from support import hub, preference, world
from support.errors import InputError

IMAGES = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "beside.py").write_text("def red(images): return images[:, 0].mean(dim=(1, 2))")
    (tmp_path / "mine.py").write_text("""
from __future__ import annotations
import beside, dataclasses, pathlib
with open(pathlib.Path(__file__).with_name("log"), "a") as log: log.write("x")
@dataclasses.dataclass
class Config:  # with its annotations as text, it needs its module in sys.modules
    x: int = 0
def red(images, prompts, metadata): return beside.red(images).double()
def index(images, prompts, metadata): return [m["box"]["i"] for m in metadata]
def writes(images, prompts, metadata):
    prompts.reverse()
    for m in metadata: m["box"]["i"] += 1
    return images.mul_(0).sum(dim=(1, 2, 3)) + metadata[0]["box"]["i"]
""")
    return tmp_path / "mine.py"


METADATA = [{"box": {"i": 3}}, {"box": {"i": 4}}]
ARGUMENTS = IMAGES, ["a", "b"], METADATA


def test_the_reward_is_the_weighted_sum_of_raw_scores(mine):
    """By hand: red is 0 and 1, index 3 and 4; 0.5 red - 2 index is -6 and -7.5."""
    reward = build_reward(f"{mine}:red:0.5,{mine}:index:-2")
    scores = reward.scores(*ARGUMENTS)
    expected = {"mine.py:red": [0, 1], "mine.py:index": [3, 4], "weighted_sum": [-6, -7.5]}
    assert {name: values.tolist() for name, values in scores.items()} == expected
    assert {values.dtype for values in scores.values()} == {torch.float32}
    assert torch.equal(reward(*ARGUMENTS), scores["weighted_sum"])
    assert [part[:2] for part in reward.parts] == [("mine.py:red", 0.5), ("mine.py:index", -2)]
    assert (mine.parent / "log").read_text() == "x", "the file is executed once"


def test_functions_of_equal_names_in_two_folders_are_kept_apart(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    for folder, value in (("a", 1), ("b", 2)):
        Path(folder).mkdir()
        Path(folder, "score.py").write_text(f"def f(*_): return [{value}, 0]")
    scores = build_reward("a/score.py:f,b/score.py:f,./mine.py:index").scores(*ARGUMENTS)
    scores = {name: values[0] for name, values in scores.items()}
    expected = {"a/score.py:f": 1, "b/score.py:f": 2, "mine.py:index": 3, "weighted_sum": 6}
    assert scores == expected


def test_a_measured_reward_of_the_same_name_does_not_change_the_sum():
    parts = [("f", 1.0, lambda *_: [1, 2]), ("f", 0.0, lambda *_: [5, 6])]
    assert rewards.Reward(parts)(*ARGUMENTS).tolist() == [1, 2]


def test_a_reward_that_writes_into_its_arguments_changes_nothing_else(mine):
    images, prompts, metadata = copy.deepcopy(ARGUMENTS)
    metadata[1] = metadata[0]  # as in a pool, where all candidates have the same prompt
    reward = build_reward(f"{mine}:writes,{mine}:red,{mine}:index")
    for _ in range(2):
        writes, red, index, _ = reward.scores(images, prompts, metadata).values()
        assert [writes.tolist(), red.tolist(), index.tolist()] == [[4, 4], [0, 1], [3, 3]]
    assert torch.equal(images, IMAGES)
    assert (prompts, metadata) == (["a", "b"], [METADATA[0]] * 2)


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda *_: None, "must return a list or a tensor of 2 numbers, not None"),
        (lambda *_: ([1, 2], {}), "not ([1, 2], {})"),
        (lambda *_: ["good", "bad"], "not ['good', 'bad']"),
        (lambda *_: [1], "not shape (1,)"),
        (lambda *_: {}["x"], "raised KeyError: 'x'"),
        (lambda *_: sys.exit(0), "raised SystemExit: 0"),
    ],
)
def test_a_reward_that_fails_is_named_with_the_prompt(function, says):
    with pytest.raises(InputError, match="^reward mine.py:f for prompt 'a' ") as error:
        rewards.Reward([("mine.py:f", 1.0, function)])(*ARGUMENTS)
    assert str(error.value).endswith(says)


@pytest.mark.parametrize(
    "spec, says",
    [
        ("nothing", "'nothing': not one of clipscore, pickscore, hpsv2, imagereward"),
        ("clipscore,", "not one of"),
        ("none.py:f", "nor an existing file.py:function"),
        ("clipscore:0", "must be a finite number, not 0"),
        ("clipscore:1e999", "must be a finite number, not 0"),
        ("clipscore,clipscore:2", "clipscore is in it twice"),
        ("clipscore,FOLDER/mine.py:green", "no attribute 'green'"),
        ("FOLDER/quits.py:f", "cannot be imported: SystemExit"),
    ],
)
def test_a_wrong_spec_is_refused_before_any_weights_are_loaded(spec, says, mine, monkeypatch):
    monkeypatch.setitem(rewards.PUBLISHED, "clipscore", lambda *_: pytest.fail("was loaded"))
    (mine.parent / "quits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(InputError, match=f"^--eval_rewards .*{re.escape(says)}"):
        build_reward(spec.replace("FOLDER", str(mine.parent)), option="--eval_rewards")


# ---------------------------------------------------------------------------------------------
# The CLIP of the tiny models


def test_clipscore_prefers_the_right_prompt_and_the_undamaged_picture():
    from experiments.pretrain_world import degrade

    clipscore, g = build_reward("clipscore", clip="tiny"), torch.Generator().manual_seed(3)
    prompts = list(world.HELD_OUT_PROMPTS) * 4
    good = world.draw(prompts, g)
    right = clipscore(good, prompts)
    assert torch.equal(right, build_reward("clipscore", clip=world.TINY / "clip")(good, prompts))
    # Both are 0.89 to 0.96, a little different on each machine, and 0.5 +- 0.03 by chance.
    assert (right > clipscore(good, prompts[1:] + prompts[:1])).float().mean() > 0.8
    assert (right > clipscore(degrade(good, g), prompts)).float().mean() > 0.8


# ---------------------------------------------------------------------------------------------
# Preprocessing


@given(h=st.integers(1, 90), w=st.integers(1, 90), side=st.integers(1, 60), seed=st.integers(0, 99))
@example(h=112, w=150, side=224, seed=0)  # many values lie halfway between two 8-bit values
@settings(max_examples=60, deadline=None)
def test_clips_picture_is_pillows_to_the_last_bit(h, w, side, seed):
    pixels = np.random.RandomState(seed).randint(0, 256, (h, w, 3), dtype=np.uint8)
    size = int(side * w / min(h, w)), int(side * h / min(h, w))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    # In two steps, since from its version 13 Pillow now and then goes along y first.
    whole = Image.fromarray(pixels).resize((size[0], h), Image.Resampling.BICUBIC)
    whole = whole.resize(size, Image.Resampling.BICUBIC)
    expected = np.array(whole.crop((left, top, left + side, top + side)))
    ours = preference.clip_pixels(tensor(pixels), side)
    assert torch.equal(ours, preference.normalize(tensor(expected)))


@pytest.mark.parametrize("preprocess", [preference.clip_pixels, preference.square_pixels])
def test_images_stay_on_their_device(preprocess):
    """A tensor on the device "meta" has no values; to copy it to the CPU is an error."""
    pixels = preprocess(torch.empty(2, 3, 48, 81, device="meta"), 32)
    assert pixels.shape == (2, 3, 32, 32) and pixels.device.type == "meta"


# ---------------------------------------------------------------------------------------------
# The published rewards, as small networks of random weights, against what their own code gave


SCORES = json.loads(originals.STORED.read_text())
PUBLISHED = tuple(SCORES["scores"])


@functools.cache
def weights(name):
    """{name of a parameter: tensor} of a reward, in the original's format."""
    shapes = SCORES["shapes"]
    arrays = originals.weights(shapes[name], seed=list(shapes).index(name))
    return {key: torch.tensor(array) for key, array in arrays.items()}


def save_weights(hub, name, state):
    """Save a state_dict as the published file of a reward has it. Returns the path."""
    path = hub / rewards.PUBLISHED[name].repository / rewards.PUBLISHED[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save({"epoch": 1, "state_dict": state} if name == "hpsv2" else state, path)
    return path


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder in the place of the hub, with a folder for each repository. ImageReward's file does
    not tell its sizes, so the small network's are put in the place of the published ones."""
    for name in PUBLISHED:
        save_weights(tmp_path, name, weights(name))
    words, bert = SCORES["clip_vocabulary"], SCORES["bert_vocabulary"]
    repositories = rewards.CLIPScore.repository, preference.PickScore.repository, preference.CLIP_H
    for repository, act in zip(repositories, ("quick_gelu", "gelu", "gelu")):
        originals.clip_files(tmp_path / repository, words, SCORES["clip_merges"])
        originals.clip_config(act, len(words)).save_pretrained(tmp_path / repository)
    cls, same = preference.ImageReward, dict(num_hidden_layers=2, num_attention_heads=4)
    (tmp_path / cls.bert).mkdir(parents=True)
    (tmp_path / cls.bert / "vocab.txt").write_text("\n".join(bert), encoding="utf-8")
    vision = same | dict(hidden_size=96, intermediate_size=384, image_size=32, patch_size=8)
    text = same | dict(hidden_size=64, intermediate_size=128, max_position_embeddings=64)
    text |= dict(vocab_size=len(bert) + 2, encoder_hidden_size=96)
    monkeypatch.setattr(cls, "vision_config", cls.vision_config | vision)
    monkeypatch.setattr(cls, "text_config", cls.text_config | text)

    def fetch(repository, patterns):
        folder = tmp_path / repository
        assert all(any(folder.glob(pattern)) for pattern in patterns)
        return folder

    monkeypatch.setattr("support.hub.fetch", fetch)
    return tmp_path


def tensor(picture):
    return torch.tensor(picture).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_reward_is_its_originals_function(name, published):
    """Portrait and landscape, noise and grey, empty, long and non-Latin prompts, and in a batch as
    alone. tests/originals.py made the expected scores with the originals' own code."""
    reward, scale = build_reward(name), {"pickscore": 1 / 26}.get(name, 1)
    expected, n = torch.tensor(SCORES["scores"][name]) * scale, len(originals.PROMPTS)
    for picture, row in zip(originals.images(), expected):
        images = tensor(picture).expand(n, -1, -1, -1)
        twice = reward(torch.cat([images, images]), originals.PROMPTS + originals.PROMPTS[::-1])
        torch.testing.assert_close(twice, torch.cat([row, row.flip(0)]), rtol=1e-4, atol=1e-6)
        last = reward(images[:1], originals.PROMPTS[-1:])
        torch.testing.assert_close(last, row[-1:], rtol=1e-4, atol=1e-6)
    nearly = (images + 0.4 / 255).clamp(max=1)  # the same picture once it is saved in 8 bits
    assert torch.equal(reward(nearly, originals.PROMPTS), reward(images, originals.PROMPTS))


def test_hpsv2_cleans_its_prompts(published):
    """Where a prompt holds "<", ftfy leaves it to the reward to unescape, twice as in open_clip."""
    reward, image = build_reward("hpsv2"), torch.rand(1, 3, 32, 32)
    assert reward(image, ["  caf\u00c3\u00a9 &amp;amp; <b> "]) == reward(image, ["caf\u00e9 & <b>"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_odd_images_get_a_score_or_a_clear_error(name, published):
    reward, wrong = build_reward(name), torch.full((3, 2, 3, 8, 8), 0.5)
    for shape in ((1, 1), (1, 300), (300, 1)):
        assert torch.isfinite(reward(torch.full((1, 3, *shape), 0.5), ["grey"])), shape
    wrong[:, 1, 2, 3, 4] = torch.tensor([float("nan"), 1.001, -0.001])
    for images in (*wrong, IMAGES[:, :1], IMAGES[:1], IMAGES[0]):
        with pytest.raises(InputError, match=r"scores 2 images \(3, H, W\) in \[0, 1\], not \("):
            reward(images, ["first", "second"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_in_half_precision_are_loaded_as_float32(name, published):
    save_weights(published, name, {key: value.half() for key, value in weights(name).items()})
    reward = build_reward(name).parts[0][2]
    assert {p.dtype for p in getattr(reward, "clip", reward).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_with_a_key_missing_or_left_over_are_refused(name, published):
    fewer = {key: value for key, value in weights(name).items() if "mlp" not in key}
    for says, state in (("issing", fewer), ("nexpected", weights(name) | {"x": torch.zeros(1)})):
        save_weights(published, name, state)
        with pytest.raises(InputError, match=f"^--reward {name}: cannot be loaded: .*{says}"):
            build_reward(name)


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_weights_are_not_executed(name, published, monkeypatch):
    monkeypatch.chdir(published)
    opens = type("Opens", (), {"__reduce__": lambda self: (open, ("ran", "w"))})()
    save_weights(published, name, weights(name) | {"x": opens})
    with pytest.raises(InputError, match="[Ww]eights.only"):
        build_reward(name)
    assert not (published / "ran").exists()


def test_weights_that_are_cut_are_refused_in_a_line(published):
    path = save_weights(published, "clipscore", weights("clipscore"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="^--reward clipscore: cannot be loaded: .*incomplete"):
        build_reward("clipscore")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached (HF_HUB_OFFLINE)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_that_the_cache_lacks_is_named_with_the_command_that_fetches_it(cache):
    snapshot = cache / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (cache / "models--a--b" / "refs").mkdir()
    (cache / "models--a--b" / "refs" / "main").write_text("0")
    for name in ("a/b", "not/there"):
        command = f"hf download {name} --include '[*].json' --include 'b.bin'.*HF_HUB_OFFLINE=1"
        with pytest.raises(InputError, match=f"b.bin is missing.*{command}"):
            hub.fetch(name, ("*.json", "b.bin"))
    (snapshot / "b.bin").touch()
    assert hub.fetch("a/b", ("*.json", "b.bin")) == snapshot


@pytest.mark.parametrize(
    "kind, says",
    [
        (errors.GatedRepoError, "gated; accept its licence on the hub"),
        (errors.RepositoryNotFoundError, "neither a folder nor such a model on the hub"),
        (errors.HfHubHTTPError, "model_index.json is missing, or the hub cannot be asked"),
    ],
)
def test_what_the_hub_refuses_is_said(kind, says, cache, monkeypatch):
    def refuse(repository, timeout):
        raise kind.__new__(kind)  # without the response that it would take

    monkeypatch.setattr("support.hub.model_info", refuse)
    with pytest.raises(InputError, match=f"a/b: {says}"):
        hub.fetch("a/b", ["model_index.json"], whole=True)


# ---------------------------------------------------------------------------------------------
# The command line, and a service of one's own


def test_a_picture_file_is_scored_upright_and_on_white(tmp_path):
    white, red, other = [1, 1, 1], [1, 0, 0], [0, 0, 1]
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "transparent.png")
    assert rewards.read_image(tmp_path / "transparent.png")[0, :, 0].T.tolist() == [red, white]
    picture, exif = Image.new("RGB", (2, 1), (255, 0, 0)), Image.Exif()
    picture.putpixel((1, 0), (0, 0, 255))
    exif[ExifTags.Base.Orientation] = 6  # the camera was turned: show it turned clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    assert rewards.read_image(tmp_path / "turned.png")[0, :, :, 0].T.tolist() == [red, other]


def test_reward_alone_scores_picture_files(published, tmp_path, capsys):
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    for file, size in zip(files, [(40, 30), (30, 60)]):
        Image.new("RGB", size, "red").save(file)
    options = [*files, "--prompt", "a red ring"]
    assert rewards.main([*options, "--reward", "pickscore,hpsv2:2"]) == 0
    names, *rows = capsys.readouterr().out.splitlines()
    assert names.split() == ["pickscore", "hpsv2", "weighted_sum"] and len(rows) == 2
    for row, file in zip(rows, files):
        first, second, both, path = row.split()
        assert path == file and float(both) == pytest.approx(float(first) + 2 * float(second), 2e-4)
    assert rewards.main([*options, "--tiny", "--device", "cpu"]) == 0
    assert "clipscore" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        f"{__file__} --prompt x --tiny",  # no picture
        "GOOD --prompt x --reward clipscore",  # not in the cache
        "GOOD --prompt x --tiny --device cuda:99",
    ],
)
def test_reward_alone_says_what_is_wrong_in_a_line(options, tmp_path, capsys, cache):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    assert rewards.main(options.replace("GOOD", f"{tmp_path}/good.png").split()) == 2
    assert error_line(capsys.readouterr().err, "reward.py")


def test_the_service_of_the_docs_is_asked_twice_again_and_then_given_up(tmp_path, monkeypatch):
    def urlopen(request, timeout):
        asked.append((json.loads(request.data)["prompts"], timeout))
        if len(asked) < 3:
            raise OSError("503")
        return io.BytesIO(b'{"scores": [4, 5]}' if works else b"<html>")

    page = (PROJECT / "docs" / "rewards.md").read_text()
    code = re.search(r"```python\n([^`]*def ask\([^`]*)```", page)[1] + "\nWAITS = (0, 0, None)\n"
    (tmp_path / "service.py").write_text(code)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    service = build_reward(f"{tmp_path / 'service.py'}:ask")
    asked, works = [], True
    assert service(IMAGES, ["four", "seven"]).tolist() == [4, 5]
    assert asked == [(["four", "seven"], 60)] * 3
    asked, works = [], False
    with pytest.raises(InputError, match="ask for prompt 'four' raised JSONDecodeError"):
        service(IMAGES, ["four", "seven"])
    assert len(asked) == 3
