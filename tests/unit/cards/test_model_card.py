"""Model cards: what the record of a training must hold, what the card says, and what people wrote into it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, metadata_load

from fewstep.cards.emissions import track_carbon
from fewstep.cards.licences import licence_of, strictest_licence
from fewstep.cards.model_card import sections, update_card, write_card
from fewstep.cards.training_record import (
    FILE,
    Ancestor,
    DataSource,
    Score,
    TrainingRecord,
    TrainingStage,
    read_scores,
    read_training,
)
from fewstep.errors import InputError

PARTS = {"unet": 6_270_000, "vae": 980_000}
STAGE = TrainingStage(
    name="unet",
    steps=3000,
    batch=64,
    precision="float32",
    hours=2.0,
    watts=100.0,
    hardware="2 cores of a CPU",
    settings={"learning_rate": 1e-4, "ema": 0.999, "note": "a | b"},
)
TRAINING = TrainingRecord(
    name="blocks",
    summary="Draws coloured solids: small, and quick.",
    example='a "red" cube',
    licence="Apache-2.0",
    data=(DataSource(what="Pictures of its own", digest="abc123"),),
    stages=(STAGE, replace(STAGE, name="decoder", hours=1.0, watts=250.0)),
    limits=("It knows 37 words.", "It draws no people."),
    kg_per_kwh=0.3,
    scores=(Score(what="exact", value=0.93, low=0.886, high=0.958, count=200, how="algorithmic reader"),),
)
STUDENT = replace(
    TRAINING,
    name="student",
    ancestors=(Ancestor(name="CompVis/stable-diffusion-v1-4", licence="creativeml-openrail-m", relation="distilled"),),
)


def test_a_record_comes_back_from_its_file(tmp_path):
    (tmp_path / FILE).write_text(STUDENT.to_json(), encoding="utf-8")
    assert read_training(tmp_path) == STUDENT


def test_hours_and_kilograms_are_those_of_all_stages():
    """2 h at 100 W and 1 h at 250 W are 0.45 kWh."""
    assert TRAINING.hours == 3
    assert TRAINING.emissions.kilowatt_hours == pytest.approx(0.45)
    assert TRAINING.emissions.kilograms == pytest.approx(0.135)


def test_the_card_of_stable_diffusion_v1_4_has_its_11_250_kilograms():
    stage = replace(STAGE, hours=150_000.0, watts=250.0)
    text = sections(replace(TRAINING, stages=(stage,)), {})["emissions"]
    assert "11,250 kg CO2 equivalent = 150,000 h x 250 W (assumed) x 0.3 kg/kWh" in text


WRONG = {
    "stages\\[0\\].steps is 'many', and should be int": lambda c: c["stages"][0].update(steps="many"),
    "stages\\[0\\].steps is True": lambda c: c["stages"][0].update(steps=True),
    "did you mean 'stages\\[0\\].precision'": lambda c: c["stages"][0].update(precison="fp16"),
    "data\\[0\\].digest is missing": lambda c: c["data"][0].pop("digest"),
    "data is 3, and should be": lambda c: c.update(data=3),
    "kg_per_kwh -1.0 is not": lambda c: c.update(kg_per_kwh=-1),
    "hours -2.0 is not": lambda c: c["stages"][0].update(hours=-2),
    "no stages": lambda c: c.update(stages=[]),
    "unknown relation 'parent'": lambda c: c.update(ancestors=[{"name": "a", "licence": "MIT", "relation": "parent"}]),
    "settings.a is \\[1\\]": lambda c: c["stages"][0]["settings"].update(a=[1]),
    "fewstep_training": lambda c: c.update(fewstep_training=9),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_record_is_refused_by_the_name_of_the_entry(message, tmp_path):
    content = json.loads(TRAINING.to_json())
    WRONG[message](content)
    (tmp_path / FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_training(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_what_is_no_record_is_refused(text, tmp_path):
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=FILE):
        read_training(tmp_path)


def test_scores_come_from_files(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('[{"what": "FID", "value": 12, "how": "own features"}]', encoding="utf-8")
    assert read_scores(path) == (Score(what="FID", value=12.0, how="own features"),)
    path.write_text('[{"what": "FID", "value": "low", "how": ""}]', encoding="utf-8")
    with pytest.raises(InputError, match=r"scores\[0\].value is 'low'"):
        read_scores(path)


def test_the_card_says_all_of_it():
    card = update_card("# blocks\n", TRAINING, PARTS)
    numbers = ("6,270,000", "abc123", "3,000", "learning_rate 0.0001", "3.000 hours", "0.886 to 0.958", "0.135 kg")
    for text in (
        *numbers,
        "float32",
        "a \\| b",
        "100 W (2 cores of a CPU), 250 W",
        "It knows 37 words.",
        "a 'red' cube",
    ):
        assert text in card, text
    assert "No other model went into it" in card


def test_the_hub_can_read_the_head(tmp_path):
    head = metadata_load(write_card(tmp_path, STUDENT, PARTS))
    assert head["license"] == "creativeml-openrail-m"
    assert head["pipeline_tag"] == "text-to-image"
    assert head["base_model"] == ["CompVis/stable-diffusion-v1-4"]
    assert head["co2_eq_emissions"]["emissions"] == pytest.approx(135)
    ModelCard.load(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("names", "holds"),
    [
        (["Apache-2.0"], "Apache-2.0"),
        (["apache-2.0", "creativeml-openrail-m"], "creativeml-openrail-m"),
        (["creativeml-openrail++-m", "stabilityai-nc-research-community", "mit"], "stabilityai-nc-research-community"),
        (["stabilityai-nc-research-community", "of somebody"], "of somebody"),
    ],
)
def test_the_most_restrictive_licence_wins(names, holds):
    assert strictest_licence(names).name == holds


def test_a_student_of_an_open_rail_teacher_cannot_be_relabelled():
    text = sections(STUDENT, {})["licence"]
    assert text.startswith("## Licence\n\n**creativeml-openrail-m**")
    assert "`student`: Apache-2.0, of its makers" in text
    assert "distilled from `CompVis/stable-diffusion-v1-4`: creativeml-openrail-m" in text


def test_an_unknown_licence_is_not_taken_for_a_free_one():
    assert "not known here" in licence_of("of somebody").terms
    head = ModelCard(update_card("# x\n", replace(TRAINING, licence="Of Somebody"), {})).data.to_dict()
    assert (head["license"], head["license_name"]) == ("other", "of somebody")


def test_what_people_wrote_stays_when_the_card_is_written_again():
    hand = "---\nlicense: mit\ntags:\n- mine\nlanguage: de\n---\n\n# My model\n\nWritten by hand.\n"
    card = update_card(hand, TRAINING, PARTS)
    card = card.replace("<!-- /fewstep: recipe -->", "<!-- /fewstep: recipe -->\n\nThe second stage was a mistake.")
    again = update_card(card, replace(TRAINING, limits=("It is slow.",)), PARTS)
    assert "# My model\n\nWritten by hand.\n" in again
    assert "The second stage was a mistake.\n\n<!-- fewstep: emissions -->" in again
    assert "It is slow." in again
    assert "37 words" not in again
    head = ModelCard(again).data.to_dict()
    assert head["language"] == "de"
    assert head["license"] == "apache-2.0"
    assert head["tags"][0] == "mine"
    assert update_card(again, replace(TRAINING, limits=("It is slow.",)), PARTS) == again


def test_regions_stay_where_people_moved_them():
    card = update_card("# x\n", TRAINING, PARTS)
    region = card[card.index("<!-- fewstep: limits -->") : card.index("<!-- /fewstep: limits -->") + 25]
    moved = card.replace(region, "").replace("<!-- fewstep: about -->", f"{region}\n\n<!-- fewstep: about -->")
    again = update_card(moved, TRAINING, PARTS)
    assert again.index("fewstep: limits") < again.index("fewstep: about")
    assert again.count("## Limits and bias") == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda card: card.replace("<!-- /fewstep: recipe -->", ""),
        lambda card: card.replace("<!-- fewstep: recipe -->", ""),
        lambda card: card + "<!-- fewstep: recipe -->\n<!-- /fewstep: recipe -->\n",
    ],
)
def test_damaged_marks_are_refused_before_anything_is_lost(damage, tmp_path):
    path = write_card(tmp_path, TRAINING, PARTS)
    damaged = damage(path.read_text(encoding="utf-8"))
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        write_card(tmp_path, TRAINING, PARTS)
    assert path.read_text(encoding="utf-8") == damaged


def test_a_broken_front_matter_is_refused():
    with pytest.raises(InputError, match="front matter"):
        update_card("---\ntags: [a\n---\n\n# x\n", TRAINING, PARTS)


def test_codecarbon_tracks_a_run_offline():
    pytest.importorskip("codecarbon")
    with track_carbon("DEU") as tracked:
        sum(range(100_000))
    assert tracked.emissions is not None
    assert tracked.emissions.watts > 0
    assert 0.05 < tracked.emissions.kg_per_kwh < 1.2
    assert "codecarbon" in tracked.emissions.statement()
    with pytest.raises(InputError, match="no grid of 'XYZ'"), track_carbon("XYZ"):
        pass
