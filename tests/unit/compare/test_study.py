"""Blind comparisons: the study on disk, the votes that come back, what they come to, and the chart of it."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.blockworld import captions, render, scenes
from fewstep.compare.chart import sample_line, write_chart
from fewstep.compare.judges import ModelJudge, block_reader, judge_votes, parse_captions
from fewstep.compare.study import KEY, SCRAMBLED, ImageSet, Study, make_study, read_study, scramble_tiles
from fewstep.compare.tally import aggregate_votes
from fewstep.compare.votes import QUESTIONS, RaterVotes, Vote, read_votes
from fewstep.errors import InputError
from fewstep.images import to_pil
from fewstep.metrics.agreement import cohen_kappa, fleiss_kappa, kappa

PROMPTS = [f"prompt {number} </script>" for number in range(11)]


def image_sets(*labels: str) -> dict[str, ImageSet]:
    """Images of one colour each, so that they can be told apart."""
    return {
        label: ImageSet(
            settings={"model": label, "steps": 1 + order},
            images=[Image.new("RGB", (16, 16), (200, 20 * number, 50 * order)) for number in range(len(PROMPTS))],
        )
        for order, label in enumerate(labels)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "study"


@pytest.fixture
def study(folder: Path) -> Study:
    return make_study(image_sets("a", "b"), PROMPTS, folder, seed=5, checks=2)


def rater_votes(study: Study, rater: str, wish: Callable[[str], str] | str, judged_by: str | None = None) -> RaterVotes:
    """Votes on every question: checks answered rightly, elsewhere for the model `wish` or what it says of a prompt."""
    votes = []
    for pair in study.pairs:
        model = wish if isinstance(wish, str) else wish(pair.prompt)
        wanted = next(m for m in pair.drawn_by if m != SCRAMBLED) if pair.is_check else model
        choice = str(1 + pair.drawn_by.index(wanted)) if wanted in pair.drawn_by else "tie"
        votes += [Vote(pair.id, question, choice) for question in QUESTIONS]
    return RaterVotes(study=study.digest, rater=rater, votes=tuple(votes), judged_by=judged_by)


def saved(content: RaterVotes, folder: Path) -> Path:
    path = folder / f"votes-{content.rater}.json"
    path.write_text(content.to_json(), encoding="utf-8")
    return path


def test_every_prompt_is_compared_once_and_sides_are_even(study, folder):
    pairs = [pair for pair in study.pairs if not pair.is_check]
    assert sorted(pair.prompt for pair in pairs) == sorted(PROMPTS)
    assert sum(pair.drawn_by == ("a", "b") for pair in pairs) in (5, 6)
    assert sum(pair.is_check for pair in study.pairs) == 2
    assert read_study(folder) == study


def test_each_picture_lies_where_the_key_says(study, folder):
    of = image_sets("a", "b")
    for pair in study.pairs:
        for path, label in zip(pair.paths, pair.drawn_by, strict=True):
            if label != SCRAMBLED:
                with Image.open(folder / path) as image:
                    assert list(image.getdata()) == list(of[label].images[PROMPTS.index(pair.prompt)].getdata())


def test_raters_find_nothing_that_tells_the_models(study, folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert study.digest in page
    assert not re.search(
        r"drawn_by|steps|scrambled|sha256|\"a\"|\"b\"", page.partition('id="asked">')[2].partition("</")[0]
    )
    for path in (folder / "pictures").iterdir():
        with Image.open(path) as image:
            assert image.info == {}
            assert re.fullmatch(r"\d{4}-[12]\.png", path.name)


def test_the_page_asks_nothing_of_a_network(folder, study):
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|\bfetch\(|XMLHttp|WebSocket|sendBeacon|import\(", page)
    assert "default-src 'none'" in page
    assert page.count("</script>") == 2  # no prompt ends a script


def test_a_seed_gives_the_same_study_again_and_another_seed_another(study, tmp_path):
    again = make_study(image_sets("a", "b"), PROMPTS, tmp_path / "again", seed=5, checks=2)
    other = make_study(image_sets("a", "b"), PROMPTS, tmp_path / "other", seed=6, checks=2)
    assert again == study
    assert [pair.drawn_by for pair in other.pairs] != [pair.drawn_by for pair in study.pairs]


def test_three_models_meet_two_by_two(folder):
    study = make_study(image_sets("a", "b", "c"), PROMPTS, folder, seed=0, checks=0)
    met = [frozenset(pair.drawn_by) for pair in study.pairs]
    assert {pair: met.count(pair) for pair in met} == {frozenset(two): 11 for two in ("ab", "ac", "bc")}


def test_a_study_is_never_overwritten(study, folder):
    with pytest.raises(InputError, match="not empty"):
        make_study(image_sets("a", "b"), PROMPTS, folder, seed=0, checks=0)
    with pytest.raises(InputError, match="at least two"):
        make_study(image_sets("a"), PROMPTS, folder.with_name("new"), seed=0, checks=0)
    assert read_study(folder) == study
    assert not folder.with_name("new").exists()


def test_a_changed_study_is_refused(study, folder):
    image = folder / study.pairs[0].paths[0]
    original = image.read_bytes()
    Image.new("RGB", (16, 16), "white").save(image)
    with pytest.raises(InputError, match="votes are void"):
        read_study(folder)
    image.write_bytes(original)
    key = json.loads((folder / KEY).read_text(encoding="utf-8"))
    key["pairs"][0]["drawn_by"].reverse()
    (folder / KEY).write_text(json.dumps(key), encoding="utf-8")
    with pytest.raises(InputError, match="its digest is not the one"):
        read_study(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fewstep_study": 2}', '{"fewstep_study": 1, "pairs": [{"id": 1}]}'])
def test_a_damaged_key_is_refused(text, tmp_path):
    (tmp_path / KEY).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="damaged, or of another version"):
        read_study(tmp_path)


def test_a_scrambled_picture_has_the_same_pixels_elsewhere():
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    mixed = scramble_tiles(noise, random.Random(1))
    assert sorted(mixed.getdata()) == sorted(noise.getdata())
    assert mixed != noise


def test_votes_come_back_as_they_were(study, folder):
    sent = rater_votes(study, "Zoë “Z” Ünal", "a")
    assert read_votes(saved(sent, folder), study.digest, {pair.id for pair in study.pairs}) == sent


def test_the_digest_of_a_ballot_is_that_of_its_lines():
    """The page computes it in another language: files that are out there must stay readable."""
    own = RaterVotes(study="s", rater="r", votes=(Vote("0001", "quality", "1"), Vote("0002", "alignment", "tie")))
    assert own.digest == hashlib.sha256(b"s\nr\n\n0001 quality 1\n0002 alignment tie").hexdigest()


BROKEN = {
    "holds no votes": [lambda c: c.pop("votes"), lambda c: c.update(votes=3), lambda c: c.update(rater="a\nb"),
                       lambda c: c.update(fewstep_votes=9), lambda c: c["votes"][0].update(more="1")],
    "another study": [lambda c: c.update(study="0" * 64)],
    "digest is wrong": [lambda c: c["votes"][0].update(choice="tie"), lambda c: c["votes"].pop(),
                        lambda c: c.update(rater="somebody else"), lambda c: c.update(judged_by="a model"),
                        lambda c: c.update(digest="0")],
}  # fmt: skip


@pytest.mark.parametrize(("message", "change"), [(m, c) for m, changes in BROKEN.items() for c in changes])
def test_foreign_damaged_and_changed_votes_are_refused(study, folder, message, change):
    path = saved(rater_votes(study, "anna", "a"), folder)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_votes(path, study.digest, {pair.id for pair in study.pairs})


@pytest.mark.parametrize(
    ("message", "votes"),
    [
        ("not in the study", [Vote("9999", "quality", "1")]),
        ("did you mean 'quality'", [Vote("0001", "qualitty", "1")]),
        ("unknown choice", [Vote("0001", "quality", "3")]),
        ("votes twice", [Vote("0001", "quality", "1"), Vote("0001", "quality", "2")]),
        ("no vote", []),
    ],
)
def test_votes_that_cannot_be_are_refused_even_with_a_right_digest(study, folder, message, votes):
    path = saved(RaterVotes(study=study.digest, rater="anna", votes=tuple(votes)), folder)
    with pytest.raises(InputError, match=message):
        read_votes(path, study.digest, {pair.id for pair in study.pairs})


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"rater,pair\n", b"null", b'"votes"', b"[" * 100_000])
def test_what_is_no_ballot_is_refused(study, tmp_path, content):
    path = tmp_path / "votes.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no votes"):
        read_votes(path, study.digest, ["0001"])
    with pytest.raises(InputError, match="cannot be read"):
        read_votes(tmp_path / "nothing.json", study.digest, ["0001"])


def test_votes_count_for_the_model_and_not_for_the_side(study):
    outcome = aggregate_votes(
        study, [rater_votes(study, "anna", "a"), rater_votes(study, "bert", "a"), rater_votes(study, "cleo", "neither")]
    )
    assert [tally.question for tally in outcome.tallies] == list(QUESTIONS)
    for tally in outcome.tallies:
        votes = tally.votes
        assert (votes.first, votes.for_first, votes.for_second, votes.ties) == ("a", 22, 0, 11)
        assert tally.prompts == 11
    assert outcome.raters == ("anna", "bert", "cleo")


def test_raters_who_miss_the_attention_checks_are_left_out_and_named(study):
    blind = rater_votes(study, "bert", "b")
    checks = {pair.id: pair for pair in study.pairs if pair.is_check}
    wrong = [
        vote._replace(choice=str(1 + checks[vote.pair].drawn_by.index(SCRAMBLED))) if vote.pair in checks else vote
        for vote in blind.votes
    ]
    outcome = aggregate_votes(study, [rater_votes(study, "anna", "a"), replace(blind, votes=tuple(wrong))])
    assert (outcome.raters, outcome.left_out) == (("anna",), ("bert",))
    assert outcome.tallies[0].votes.for_second == 0
    assert "1 left out" in sample_line(outcome)
    with pytest.raises(InputError, match="1 of 1 raters failed"):
        aggregate_votes(study, [replace(blind, votes=tuple(wrong))])


def test_the_same_rater_cannot_vote_twice(study):
    one = rater_votes(study, "anna", "a")
    with pytest.raises(InputError, match="'anna' votes 2 times"):
        aggregate_votes(study, [one, one])
    with pytest.raises(InputError, match="no votes to count"):
        aggregate_votes(study, [])


def test_a_model_s_votes_say_so_and_never_mix_with_people_s(study):
    machine = rater_votes(study, "scorer", "a", judged_by="scorer")
    outcome = aggregate_votes(study, [machine])
    assert outcome.title == "Judged by model: scorer"
    assert "by a model" in sample_line(outcome)
    assert {row["voted"] for row in outcome.rows()} == {"model: scorer"}
    assert aggregate_votes(study, [rater_votes(study, "anna", "a")]).title == "Human preference, 1 rater"
    with pytest.raises(InputError, match="cannot be counted together"):
        aggregate_votes(study, [machine, rater_votes(study, "anna", "a")])


def test_cohen_s_kappa():
    """20 times both yes, 15 times both no, 5 and 10 times one of each: 0.7 observed, 0.5 by chance."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_fleiss_kappa_of_the_table_in_his_paper():
    """The worked example that is widely repeated: 10 subjects, 14 raters, 5 categories, 0.210."""
    table = [(0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
             (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)]  # fmt: skip
    chosen = [[name for name, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss_kappa(chosen) == pytest.approx(0.210, abs=5e-4)


def test_kappa_takes_what_was_rated_twice():
    assert kappa({"anna": {"1": "a", "2": "b", "3": "a"}, "bert": {"1": "a", "2": "b", "4": "b"}}) == 1
    assert kappa({"anna": {"1": "a", "2": "b"}, "bert": {"1": "a", "2": "b"}, "cleo": {"1": "a"}}) == 1
    assert kappa({"anna": {"1": "a"}}) is None
    assert kappa({"anna": {"1": "a"}, "bert": {"1": "a"}}) is None  # chance alone would agree as much
    assert kappa({}) is None


def test_agreement_is_in_the_outcome(study):
    def taste(prompt: str) -> str:
        return "a" if PROMPTS.index(prompt) % 2 else "b"

    agreed = aggregate_votes(study, [rater_votes(study, name, taste) for name in ("anna", "bert", "cleo")])
    assert {tally.kappa for tally in agreed.tallies} == {1.0}
    assert "kappa 1.00 (image quality)" in sample_line(agreed)


def test_scenes_are_read_back_from_their_captions():
    """Every wording that captions have, mirrored ones among them."""
    wanted = scenes(400, seed=3, single=0.4)
    read = parse_captions(captions(wanted, seed=4, style="varied"))
    pairs = wanted.count == 2
    assert torch.equal(read.count, wanted.count)
    assert torch.equal(read.relation, wanted.relation)
    for name in ("shape", "colour"):
        assert torch.equal(getattr(read, name)[:, 0], getattr(wanted, name)[:, 0])
        assert torch.equal(getattr(read, name)[pairs], getattr(wanted, name)[pairs])


@pytest.mark.parametrize(
    "caption", ["a photo of a dog", "a red cube on top of", "red cube", "", "a red cube a blue cone"]
)
def test_the_reader_judges_block_scenes_only(caption):
    with pytest.raises(InputError, match="block world"):
        parse_captions([caption])


def test_the_reader_votes_for_the_picture_that_shows_the_prompt(folder):
    wanted = scenes(6, seed=1, single=0.5)
    prompts = captions(wanted, seed=1, style="canonical")
    right = to_pil(render(wanted, 64))
    empty = [Image.new("RGB", (64, 64), "grey") for _ in right]
    study = make_study(
        {"right": ImageSet(settings={}, images=right), "empty": ImageSet(settings={}, images=empty)},
        prompts, folder, seed=0, checks=1,
    )  # fmt: skip
    outcome = aggregate_votes(study, [judge_votes(study, folder, block_reader())])
    (tally,) = outcome.tallies
    assert (tally.question, tally.votes.for_first, tally.votes.for_second) == ("alignment", 6, 0)
    assert outcome.title == "Judged by model: algorithmic reader"


def test_a_judge_is_any_function_of_prompts_and_images_of_one_size(folder):
    def darkness(prompts, images):
        assert len(prompts) == len(images)
        assert images.dtype == torch.float32
        return (-images.mean((1, 2, 3))).tolist()

    large = {
        name: replace(d, images=[p.resize((24, 24)) for p in d.images]) for name, d in image_sets("a", "b").items()
    }
    study = make_study({**image_sets("a", "b"), "b": large["b"]}, PROMPTS, folder, seed=0, checks=1)
    (tally,) = aggregate_votes(
        study, [judge_votes(study, folder, ModelJudge(name="d", question="quality", score=darkness))]
    ).tallies
    assert tally.votes.for_first == 11  # "b" has more blue


def test_the_chart_says_who_voted_and_is_the_same_each_time(study, tmp_path):
    pytest.importorskip("matplotlib")
    outcome = aggregate_votes(study, [rater_votes(study, "scorer", "a", judged_by="scorer")])
    paths = write_chart(outcome, tmp_path / "chart")
    assert [path.name for path in paths] == ["chart.svg", "chart.png"]
    drawn = paths[0].read_bytes()
    assert b"<!-- Judged by model: scorer -->" in drawn
    assert b"<!-- Image quality -->" in drawn
    assert b"95 % Wilson interval" in drawn
    write_chart(outcome, tmp_path / "chart")
    assert paths[0].read_bytes() == drawn
    with Image.open(paths[1]) as image:
        assert min(image.size) > 300
