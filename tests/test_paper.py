"""experiments/paper.py: its arithmetic, its command lines, and what each control replaces."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import rollout
import train
from experiments import paper
from support import models

FIRST = (0.1, 0.2, 0.2, 0.5)  # held-out rewards after 0, 10, 20 and 30 updates


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function that writes the folder of a complete run; accuracy is R / 2, clear is 1 - R."""

    def record(name, rewards, every=10):
        scores = [{"eval/reward": R, "eval/accuracy": R / 2, "eval/clear": 1 - R} for R in rewards]
        lines = [{"step": 1, "loss": 1.0}] + [{"step": every * i} | s for i, s in enumerate(scores)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "complete").touch()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return paper.Run(tmp_path / name)

    monkeypatch.setattr(paper, "RUNS", tmp_path)
    return record


def test_a_milestone_is_interpolated_between_evaluations(recorded):
    run = recorded("run", FIRST)
    assert run.reach(0.1) == 0 and run.reach(0.15) == pytest.approx(5)
    assert run.reach(0.2) == pytest.approx(10)  # the first of the two evaluations with this reward
    assert run.reach(0.4) == pytest.approx(20 + 10 * 2 / 3) and run.reach(0.6) == math.inf
    assert [run.reward_at(share) for share in (0.1, 0.5, 0.7, 0.9)] == [0.1, 0.2, 0.2, 0.5]
    assert paper.show([0.1, 0.2, 0.3], "+.2f") == "+0.20 ± 0.06"
    assert paper.show([1.0, math.inf, 2.0]) == "not reached by 1 of 3"


def test_a_row_has_its_own_gains_and_the_leads_of_pairs_of_a_model_and_a_seed(recorded):
    """The highest gain is 0.4 - 0.1. The first variant has 0.3 after 20 + 10 / 3 updates, 78% of
    30, and flux's 0.1 after none. The leads of 0.2 and 0.4 at the end are 0.3 ± 0.1 on average."""
    for model, rewards in (("sana", (0.1, 0.4, 0.0, 0.3)), ("flux", (0.1, 0.4, 0.0, 0.1))):
        recorded(f"{model} 0", FIRST)
        recorded(f"{model} 0 --pool 4", rewards)
    given = SimpleNamespace(models=["sana", "flux"], seeds=[0])
    _, rows = paper.compare(given, ["", "--pool 4"], ["paper 1", "paper 2"])
    gains = ["0.1000", "0.3000", "0.3000", "0.3000", "-0.1000", "0.2000", "0.3000"]
    scores, leads = ["5.0%", "15.0%", "90.0%", "70.0%"], ["-0.2000", "+0.2000", "78%"]
    assert rows[1] == ["sana", "--pool 4", *gains, *scores, *leads, "paper 2"]
    assert rows[0][-4:] == ["", "", "", "paper 1"]
    assert rows[5][-4:] == ["-0.2000", "+0.3000 ± 0.1000", "39% ± 39%", "paper 2"]


def test_costs_and_the_way_to_the_plateau_by_hand(recorded):
    """The model is evaluated 96 x 6 + 24 x 10 times to draw, 24 x 4 times x 5 to train; 24 of 24
    draws in 240. The plateau is .5, the last third of four evaluations. With half of the updates
    the cost ratio is 2 x 720 / 1296 = 1.11; with the rollout of 960 / 2.33 it is 1.61."""
    assert paper.evaluations(train.parse_options(["--model=flux"])) == (816, 480)
    recorded(f"flux 0 {paper.LONG} --algorithm diffusionnft", FIRST)
    recorded(f"flux 0 {paper.LONG}", FIRST, every=5)
    given = SimpleNamespace(models=["flux"], seeds=[0])
    _, rows = paper.plateau(given)
    assert ["flux", "50%", "23.3", "11.7", "1.11", "1.61", "1.9"] in rows
    run = recorded("falls", (0.1, 0.4, 0.3, 0.35))  # by .1 and by .05 below its highest reward
    assert run.fall(10) == pytest.approx(0.1) and run.fall(30) == pytest.approx(0.05)
    run = recorded("six evaluations", (0.1, 0.2, 0.3, 0.4, 0.9, 0.7))
    assert run.plateau() == pytest.approx(0.8)


def test_contrast_is_that_of_the_kept_rewards(tmp_path):
    """The mean standard deviation of 24 normal numbers is .97; by simulation elsewhere the best and
    worst 12 of 96 have 1.68. A proxy that says nothing keeps 24 random ones."""
    assert paper.contrast(24, 24) == pytest.approx(0.97, abs=0.005)
    assert paper.contrast(96, 24) == pytest.approx(1.68, abs=0.005)
    assert paper.contrast(96, 24, rho=0.0) == pytest.approx(0.97, abs=0.005)
    figure = tmp_path / "budget.png"
    given = SimpleNamespace(speed_up=[1, 3], rho=1.0, training=720, output=figure)
    _, rows = paper.budget(given)
    # 96: 576 / s + 240 + 720 beside 960, times .97 / 1.68.
    assert rows[2] == ["96", "1.68", "58%", "0.92", "0.69"] and figure.exists()
    given.training = 0  # 96: (576 / s + 240) / 240 x .58
    assert paper.budget(given)[1][2][3:] == ["1.96", "1.04"]


def test_the_measured_contrast_is_of_the_true_rewards_of_seeds_that_the_proxy_chooses(monkeypatch):
    """True rewards 0, 1, 2, 3: the std is 1.118. The proxy keeps 1 and 2, whose std is .5."""
    rewards = iter([torch.tensor([[5.0, 9.0, 1.0, 4.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])])
    model = SimpleNamespace(transformer=None, keep_bf16=())
    monkeypatch.setattr(models, "load", lambda name: model)
    monkeypatch.setattr(paper, "make_copy", lambda *_: (None, []))
    monkeypatch.setattr(paper, "pool_rewards", lambda *_: next(rewards))
    monkeypatch.setattr(paper, "POOLS", (2, 4))
    rho, measured = paper.measured_pools("sana")
    assert rho == pytest.approx(-0.43, abs=0.01) and measured[4] == [
        pytest.approx(0.5 / 1.118, 1e-3)
    ]


def test_agreement_is_the_mean_cosine_of_gradients(monkeypatch):
    """The cosines of three vectors, at 0, 45 and 90 degrees, are .707, .707 and 0."""
    three = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert paper.mean_cosine(three) == pytest.approx(2 * 0.5**0.5 / 3)
    assert paper.jackknife(lambda rows: sum(rows) / len(rows), 3) == pytest.approx([0, 1, 2])
    gradients = {24: [[1.0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]], 96: [[1.0, 0, 0, 0]] * 3}
    monkeypatch.setattr(paper, "update_gradients", lambda _, pool: torch.tensor(gradients[pool]))
    _, rows = paper.agreement(SimpleNamespace(models=["sana"]))
    assert [cell.split()[0] for cell in rows[0]] == ["sana", "0.500", "1.000", "71%"]
    monkeypatch.undo()
    (gradient,) = paper.update_gradients("sana", pool=24, updates=1)
    assert gradient.dim() == 1 and gradient.norm() > 0


def test_ranks_are_the_true_ones_of_the_proxys_best_and_worst(monkeypatch):
    """Truly the four seeds rank 1, 2, 3, 4. By proxy the second is best and the first worst. With
    proxy and truth exchanged these ranks would be 4 and 3; those of BF16 itself are 1 and 4."""
    truth = [4.0, 3.0, 2.0, 1.0]
    rewards = {("bf16", 10): truth, ("bf16", 6): truth, ("fp8", 6): [1.0, 4.0, 3.0, 2.0]}
    seeds, text = paper.candidate_seeds(0, 0, 0, 4), SimpleNamespace(take=lambda i: None)
    model = SimpleNamespace(transformer="bf16", keep_bf16=("norm",), encode=lambda prompts: text)

    def draw(model, network, text, batch, steps):
        return None, torch.tensor([rewards[network, steps][seeds.index(seed)] for seed in batch])

    monkeypatch.setattr(paper, "POOL", 4)
    monkeypatch.setattr(paper, "KEEP", 1)
    monkeypatch.setattr(paper, "BEST", (1, 2))
    monkeypatch.setattr(paper, "draw", draw)
    monkeypatch.setattr(paper, "make_copy", lambda model, precision, skip: (precision, []))
    monkeypatch.setattr(paper, "build_reward", lambda *_, **__: lambda images, prompts: images)
    monkeypatch.setattr(models, "load", lambda name: model)
    given = SimpleNamespace(models=["sana"], prompts=1, precision="fp8", explore_steps=None)
    fp8, bf16 = [row for row in paper.fidelity(given)[1] if row[0] == "sana"]
    # The percentile of rank 2 of 4 is 2 / 3; the best two of "fp8" have the ranks 2 and 3.
    assert fp8[-4:] == ["2.000", "1.000", "66.7%", "50.0%"]
    assert bf16[-4:] == ["1.000", "4.000", "100.0%", "83.3%"]


def test_a_run_is_made_once_and_a_failed_one_is_named(recorded, monkeypatch):
    commands = []

    def made(command, **_):
        commands.append(command[1:8])
        recorded("sana 2 control negated --keep 4", FIRST)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(paper.subprocess, "run", made)
    for _ in range(2):
        assert paper.finish("sana", "control negated --keep 4", 2).rewards == list(FIRST)
    program = "experiments/paper.py control negated --keep 4 --model=sana --seed=2"
    assert commands == [program.split()]
    failed = SimpleNamespace(returncode=2, stderr="said\ntrain.py: error: --pool 1: no\n")
    monkeypatch.setattr(paper.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(paper.InputError, match="^train.py: error: --pool 1: no "):
        paper.finish("sana", "--pool 1", 0)


def test_every_variant_is_a_command_line():
    variants = [*paper.VARIANTS.values(), paper.NAIVE_FP4]
    for options in map(str.split, [*sum(map(list, variants), []), *paper.UPDATE_RULES.values()]):
        control = options[0:2] if options[:1] == ["control"] else []
        train.parse_options(options[len(control) :])
        assert set("".join(control[1:]).split("+")) <= {"", *paper.CONTROLS}
    bad = "fidelity --prompts 73; fidelity --explore_steps 4; control negate; pool --pool 4"
    for words in bad.split("; "):
        assert paper.exit_code("paper.py", lambda words=words: paper.main(words.split())) == 2


def test_tables_of_the_page_are_those_of_the_files(tmp_path, monkeypatch):
    (tmp_path / "pool.csv").write_text('model,paper,lead\nsana,1,"2, 3"\nflux,4,5\n')
    monkeypatch.setattr(paper, "DATA", tmp_path)
    page = "#\n<!-- pool.csv: lead, model; model = sana -->\n{}\n| x |\n"
    table = "| lead | model |\n| --- | --- |\n| 2, 3 | sana |\n"
    assert paper.fill(page.format("| old |\n")) == page.format(table)


def test_rows_of_other_models_stay_and_an_answer_about_one_precision_is_only_printed(
    tmp_path, monkeypatch
):
    for name in ("DATA", "RESULTS"):
        monkeypatch.setattr(paper, name, tmp_path / name)
    paper.DATA.mkdir()
    paper.RESULTS.write_text("")
    function = lambda given: (["model", "a"], [[given.models[0], "1"]])  # noqa: E731
    monkeypatch.setitem(paper.EXPERIMENTS, "fidelity", ("", function))
    paper.main(["fidelity", "--precision", "fp8"])
    assert not list(paper.DATA.iterdir())
    for name in ("sana", "sd3", "sana"):
        paper.main(["fidelity", "--models", name])
    rows = [line.split(";")[0] for line in (paper.DATA / "fidelity.csv").read_text().splitlines()]
    expected = [f'{name},1,"paper.py fidelity --models {name}' for name in ("sd3", "sana")]
    assert rows == ["model,a,made by", *expected]


def test_the_tables_of_results_are_those_of_docs_data():
    page = paper.RESULTS.read_text()
    assert paper.fill(page) == page


# ---------------------------------------------------------------------------------------------
# Controls


def gradients(nft_loss):
    """Gradients by v of two samples with A = 3 and -2 of one number each: x_0 0, noise 1, t 1/2;
    v = v_old = 2, so that x_t = 1/2, x_0_hat = -1/2 and w = 1/2."""
    x_0, v = torch.zeros(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0, requires_grad=True)
    t, advantages = torch.tensor([0.5, 0.5]), torch.tensor([3.0, -2.0])
    nft_loss(v, v.detach(), v.detach(), x_0 + 0.5, x_0, t, advantages, 1.0, 5.0, 0.0)[0].backward()
    return v.grad.flatten().tolist()


def test_controls_do_what_they_say(monkeypatch):
    """A sample's gradient is A / 2 samples: (error^2 / w)' = 2 x 1/2 x 1/2 / 1/2 = 1. Of a picture
    with one pixel of 0.9, that pixel is 0.8 from its mean, the 4 corners 0.9 / 4, the sides / 6."""
    rewards = torch.tensor([[0.1, 0.2, 0.6], [0.3, 0.3, 0.9]])
    assert torch.equal(paper.negated(rewards, 5.0, "all"), -train.group_advantages(rewards))
    assert torch.equal(paper.weights_one(rewards, 5.0, "all"), torch.full((2, 3), 5.0))
    assert gradients(train.nft_loss) == pytest.approx([1.5, -1.0])
    assert gradients(paper.advantage_weighted) == pytest.approx([1.5, 0.0])
    # The error's gradient by v is 1/2. The margin is 0, where logsigmoid has the slope 1/2.
    assert gradients(paper.pairwise_dpo) == pytest.approx([100 / 4, -100 / 4])
    samples, etas = [rollout.Candidates([i], f"text {i}", []) for i in range(3)], {}
    monkeypatch.setattr(paper, "update", lambda run, *_: run.optimizer.param_groups[0]["lr"])
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    run = SimpleNamespace(optimizer=optimizer, config=train.parse_options(["--steps=4"]))
    assert paper.decaying_rate(run, None, None, 1) == pytest.approx(3e-3 * 3 / 4)
    monkeypatch.setattr(paper, "update", lambda run, samples, *_: [c.text for c in samples])
    monkeypatch.setattr(paper, "follow", lambda _, follower, eta: etas.update({follower: eta}))
    assert paper.other_text(None, samples, None, 0) == ["text 1", "text 2", "text 0"]
    paper.old_policy(1.0)(None, "old", eta=0.1)
    paper.old_policy(1.0)(None, "ema", eta=0.2)
    assert etas == {"old": 1.0, "ema": 0.2}
    paper.CONTROLS["old_slow"][2](None, "old", eta=0.1)
    assert etas["old"] == 0.9
    drawn = [f"a large plain {colour} ring in the middle" for colour in ("purple", "red", "purple")]
    pictures = paper.world.draw(drawn, torch.Generator().manual_seed(0))
    prompts = ["a red ring", "a red ring", "a purple ring"]
    assert paper.rarely_right(pictures, prompts, None).tolist() == [1, 0, 0]
    model = SimpleNamespace(transformer=torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)}))
    assert paper.every_layer(model, "nvfp4", ("a",), 0)[1] == [("a", 16, 16, "nvfp4")]
    images = torch.zeros(1, 3, 3, 3)
    images[0, :, 1, 1] = 0.9
    assert paper.smooth(images, [""], [{}]).item() == pytest.approx(-(0.8 + 0.9 + 0.6) / 9)


def test_a_control_replaces_what_train_calls(monkeypatch):
    for module, name, _ in paper.CONTROLS.values():
        monkeypatch.setattr(module, name, getattr(module, name))  # undone after the test
    monkeypatch.setattr(train, "main", lambda argv: len(argv))
    command = ["control", "negated+every_layer+old_fixed", "--steps", "2", "--lora=x"]
    assert paper.exit_code("paper.py", lambda: paper.main(command)) == 3
    replaced = train.group_advantages, train.rollout.make_copy, train.models.follow
    assert replaced == (paper.negated, paper.every_layer, paper.CONTROLS["old_fixed"][2])
    assert train.nft_loss is not paper.advantage_weighted
