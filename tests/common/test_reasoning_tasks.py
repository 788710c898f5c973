"""Tasks of reasoning-gym as files: the same by seed, read as any file, verified by the library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.run import RunConfig
from common.data.files.lists import files_at
from common.data.mixture import source_of
from common.data.records import Prompt, read_demonstrations, read_prompts
from common.errors import DataError
from common.files import is_local, resolve
from common.reasoning_tasks import family_of, name_of, verified
from deploy.run_folder.fingerprints import fingerprint
from deploy.run_folder.paths import anchored, rebased

SUMS = "reasoning_gym:chain_sum?size=20&max_terms=2&max_digits=2"
FAMILIES = {
    "chain_sum": {"max_terms": 2},
    "spell_backward": {"max_word_len": 5},
    "letter_counting": {},
    "gcd": {},
    "word_sequence_reversal": {},
    "number_filtering": {},
    "simple_equations": {},
    "basic_arithmetic": {"operators": ["+", "-"]},
    "number_sorting": {"max_value": 10},
    "fraction_simplification": {"styles": ["plain"]},
    "time_intervals": {},
}


def prompts(name: str) -> list[Prompt]:
    return list(read_prompts([name], columns=None))


def digests(name: str) -> list[str]:
    return [prompt.columns["question"] for prompt in prompts(name)]


def test_lines_are_prompts_and_demonstrations_with_what_a_scorer_needs() -> None:
    asked, shown = prompts(SUMS), list(read_demonstrations([SUMS]))
    assert len(asked) == len(shown) == 20
    assert [p.columns["index"] for p in asked] == list(range(20))
    assert {p.columns["task"] for p in asked} == {SUMS}
    assert {p.columns["source"] for p in asked} == {"chain_sum"}
    assert asked[3].place == f"{SUMS}:4"
    assert [m["role"] for m in asked[0].messages] == ["system", "user"]
    for prompt, demonstration in zip(asked, shown, strict=True):
        expression = prompt.prompt.rpartition(": ")[2].removesuffix(" =")
        one, sign, other = expression.split()
        total = int(one) + int(other) * (1 if sign == "+" else -1)
        assert prompt.columns["answer"] == str(total)
        assert demonstration.response == f"<answer>{total}</answer>"


def test_plain_texts_and_another_system_message() -> None:
    plain = prompts(f"{SUMS}&chat=false")[0]
    assert not plain.messages
    assert plain.prompt.endswith(" =\n")
    said = prompts(f"{SUMS}&system=Be%20brief.")[0]
    assert said.messages[0]["content"] == "Be brief."
    assert [m["role"] for m in prompts(f"{SUMS}&system=")[0].messages] == ["user"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_librarys_own_answers_are_right(family: str) -> None:
    name = name_of(family, {**FAMILIES[family], "size": 8, "seed": 5})
    for shown in read_demonstrations([name]):
        index = int(shown.place.rpartition(":")[2]) - 1
        asked = digests(name)[index]
        assert verified(name, index, asked, f"Well. {shown.response}") == (True, 1.0)
        unfinished = shown.response.removesuffix("</answer>")
        assert verified(name, index, asked, unfinished) == (False, 0.0)


def test_a_family_without_answers_of_its_own_has_prompts_alone() -> None:
    name = "reasoning_gym:propositional_logic?size=3"
    assert [prompt.columns["answer"] for prompt in prompts(name)] == [None] * 3
    with pytest.raises(DataError, match="size=3:1: field 'messages': ends without the assi"):
        list(read_demonstrations([name]))


def test_what_is_wrong_or_near_is_not_right() -> None:
    right, asked = int(prompts(SUMS)[0].columns["answer"]), digests(SUMS)[0]
    answered, score = verified(SUMS, 0, asked, f"<answer>{right + 1}</answer>")
    assert answered
    assert score < 1.0
    # The last answer counts, as the library reads them.
    said = f"<answer>1000</answer><answer>{right}</answer>"
    assert verified(SUMS, 0, asked, said) == (True, 1.0)
    with pytest.raises(DataError, match=r"has no task 20; it has 20$"):
        verified(SUMS, 20, asked, "<answer>1</answer>")
    with pytest.raises(DataError, match="task 1 asks something else here than where its prompt"):
        verified(SUMS, 1, asked, "<answer>1</answer>")


def test_an_answer_that_makes_the_library_fail_is_wrong() -> None:
    name = "reasoning_gym:prime_factorization?size=1"
    assert verified(name, 0, digests(name)[0], "<answer>abc</answer>") == (True, 0.0)


def test_readers_of_one_name_do_not_disturb_each_other() -> None:
    name = "reasoning_gym:chain_sum?size=4000"
    pairs = zip(read_prompts([name]), read_prompts([name]), strict=True)
    assert all(one == other for one, other in pairs)


def test_neighbouring_seeds_are_other_data() -> None:
    """The library's own would share all questions but one."""
    one, other = (
        {p.prompt for p in prompts(f"reasoning_gym:letter_counting?size=200&seed={seed}")}
        for seed in (0, 1)
    )
    assert len(one & other) < 10


@pytest.mark.slow
def test_the_same_name_is_the_same_data_in_every_process() -> None:
    """Of every family that is not refused, whatever Python's hash seed is."""
    code = """
import json
from reasoning_gym.factory import DATASETS
from common.errors import DataError
from deploy.run_folder.fingerprints import fingerprint
found = {}
for family in sorted(DATASETS):
    try:
        found[family] = fingerprint(f"reasoning_gym:{family}?size=3&seed=5", "x").xxh3_128
    except DataError as error:
        found[family] = ""
print(json.dumps(found))
"""
    beside_each_other = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    said = [process.communicate()[0] for process in beside_each_other]
    one, other = (json.loads(text[text.index("{") :]) for text in said)  # a family prints dots
    assert {family for family in one if one[family] != other[family]} == set()
    assert one["chain_sum"] == fingerprint("reasoning_gym:chain_sum?size=3&seed=5", "x").xxh3_128
    assert fingerprint(f"{SUMS}&seed=1", "x").xxh3_128 != fingerprint(SUMS, "x").xxh3_128
    # `composite` is made of others, which nothing here names.
    assert sorted(family for family, digest in one.items() if not digest) == [
        *("composite", "isomorphic_strings", "knight_swap", "polynomial_multiplication"),
        *("ransom_note", "word_ladder"),
    ]


def test_a_name_stands_wherever_a_file_does(tmp_path: Path) -> None:
    assert files_at([SUMS]) == [SUMS]
    assert not is_local(SUMS)
    assert is_local("reasoning_gym/chain_sum")
    config = RunConfig.model_validate({"data": {"prompts": [SUMS]}})
    assert anchored(config).data.prompts == (SUMS,)
    assert rebased(config, tmp_path).data.prompts == (SUMS,)
    assert {source_of(prompt, None) for prompt in prompts(SUMS)} == {"chain_sum"}
    filesystem, inner = resolve(SUMS)
    with filesystem.open_input_stream(inner) as stream:
        assert stream.read().count(b"\n") == 20


@given(
    family=st.sampled_from(["chain_sum", "gcd"]),
    options=st.dictionaries(
        st.text("abc_", min_size=1),
        st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)),
    ),
)
def test_names_are_paths_that_tell_their_family(family: str, options: dict[str, Any]) -> None:
    name = name_of(family, options)
    assert family_of(name) == family
    assert not is_local(name)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("chain_sun", r"has no family 'chain_sun'; did you mean 'chain_sum'\?$"),
        ("zzz", "has no family 'zzz'; its documentation shows all of them$"),
        ("", "has no family ''; "),
        ("chain_sum?max_term=3", r"chain_sum has no option 'max_term'; did you mean 'max_terms'\?"),
        ("chain_sum?zzz=3", "no option 'zzz'; there are allow_negation, chat, max_digits, max_te"),
        ("chain_sum?size=3&size=4", "option 'size' is there twice; keep one of them$"),
        ("chain_sum?size=many", "option 'size' is 'many'; write a whole number$"),
        ("chain_sum?size=true", "option 'size' is 'True'; write a whole number$"),
        ("chain_sum?size=0", "write a size from 1 to 10000000 and a seed from 0 on$"),
        ("chain_sum?seed=-1", "write a size from 1 to 10000000 and a seed from 0 on$"),
        ("chain_sum?chat=1", "option 'chat' is '1'; write true or false$"),
        ("chain_sum?max_terms=two", "option 'max_terms' is \"two\"; write a value like its defau"),
        ("chain_sum?max_terms=1", r"refuses these options \(max_terms must be >= min_terms\); cha"),
        ("simple_equations?operators_weights=[1,0]", "the library refuses these options"),
        (
            "word_sorting?transformation=loud",
            'is "loud"; write a value like its default, "or',
        ),
        (
            "time_intervals?task_types=time",
            "option 'task_types' is \"time\"; write a value like",
        ),
        ("word_ladder", "questions of 'word_ladder' differ from process to process, so no answer"),
    ],
)
def test_bad_names_are_one_line(name: str, wrong: str) -> None:
    with pytest.raises(DataError, match=wrong) as raised:
        prompts(f"reasoning_gym:{name}")
    assert str(raised.value).startswith(f"reasoning_gym:{name}: ")
    assert "\n" not in str(raised.value)


def test_without_the_package_a_line_says_how_to_get_it() -> None:
    code = """
import sys
sys.modules["reasoning_gym"] = None
from common.data.records import read_prompts
try:
    list(read_prompts(["reasoning_gym:chain_sum"]))
except Exception as error:
    print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == (
        "DataError reasoning_gym:chain_sum: needs the package reasoning-gym (reasoning_gym is not "
        "installed); run `pip install 'talipot[reasoning]'`\n"
    )
