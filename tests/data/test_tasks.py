"""Prompt forms: the hub's columns and the uniform layout give the same texts, and those are lm-eval's."""

import pytest

from lsr_scale.data.prompt_forms import scored_pair
from lsr_scale.data.rows import RowError
from lsr_scale.data.tasks import TASKS, check_task, detect_task, is_uniform, to_example
from lsr_scale.errors import UserError

# Rows in the column layouts of the hub datasets, written for this test. Among them: WikiHow markup, a capital in
# HellaSwag's ctx_b, labels that are numbers, a stem that ends in a space, choices of very different lengths.
LETTERS = ["A", "B", "C", "D"]
HUB_ROWS = {
    "piqa": [
        {"goal": "Keep bread fresh.", "sol1": "Put it in a closed tin.", "sol2": "Put it in the rain.", "label": 0},
        {"goal": "how do you dry a wet book?", "sol1": "Boil it.", "sol2": "Stand it open near a fan.", "label": 1},
        {"goal": "Cool tea", "sol1": "wait", "sol2": "Heat it for an hour, then wrap it in wool", "label": 0},
    ],
    "hellaswag": [
        {"ind": 4, "activity_label": "Rowing", "ctx_a": "Two men sit in a boat.", "ctx_b": "the taller Man",
         "endings": ["lifts both oars.", "eats the lake.", "is a boat.", "paints the sky red with an oar."],
         "label": "0"},
        {"ind": 5, "activity_label": "Home and Garden", "ctx_b": "",
         "ctx_a": "[header] How to prune a rose [title] Wait for spring. [step] Roses rest in winter.",
         "endings": ["Cut above a bud.", "Burn [substeps] the bed.", "Sing  loudly.", "Sell it."], "label": "0"},
        {"ind": 6, "activity_label": "Chess", "ctx_a": "A girl moves a pawn.", "ctx_b": "she",
         "endings": ["waits.", "flies away over the board.", "melts.", "is a pawn."], "label": "2"},
    ],
    "winogrande": [
        {"sentence": "Ann lent Mia a coat because _ was cold.", "option1": "Ann", "option2": "Mia", "answer": "2"},
        {"sentence": "Tom asked Bob about _'s new job at the mill.", "option1": "Tom", "option2": "Bob", "answer": "2"},
        {"sentence": "The cup fell off the tray since the _ was tilted", "option1": "cup", "option2": "tray",
         "answer": "2"},
    ],
    "arc_easy": [
        {"id": "a1", "question": "Which of these is a liquid?", "answerKey": "C",
         "choices": {"text": ["iron", "oxygen", "milk", "sand"], "label": LETTERS}},
        {"id": "a2", "question": "What pulls a stone down?", "answerKey": "2",
         "choices": {"text": ["light", "gravity", "sound"], "label": ["1", "2", "3"]}},
        {"id": "a3", "question": "Which animal lays eggs?", "answerKey": "A",
         "choices": {"text": ["a hen that lives on a farm near a river", "dog", "cow", "cat"], "label": LETTERS}},
    ],
    "openbookqa": [
        {"id": "o1", "question_stem": "A candle gives off ", "answerKey": "B",
         "choices": {"text": ["cold", "light and heat", "snow", "iron"], "label": LETTERS}},
        {"id": "o2", "question_stem": "Bees carry", "answerKey": "D",
         "choices": {"text": ["rocks", "cars", "books", "pollen"], "label": LETTERS}},
    ],
    "boolq": [
        {"idx": 0, "question": "is the moon a star", "passage": "The Moon is a satellite of the Earth.", "label": 0},
        {"idx": 1, "question": "do whales breathe air", "passage": "Whales are mammals.\nThey surface for air.",
         "label": 1},
    ],
    "social_iqa": [
        {"context": "Lea broke a vase.", "question": "How would Lea feel?", "answerA": "sorry",
         "answerB": "proud of it", "answerC": "tall", "label": "1"},
        {"context": "Max found a coin.", "question": "What will Max do next?", "answerA": "eat it", "answerB": "sleep",
         "answerC": "pick it up", "label": "3"},
    ],
    "commonsense_qa": [
        {"id": "c1", "question": "Where do you keep milk? ", "question_concept": "milk", "answerKey": "C",
         "choices": {"label": [*LETTERS, "E"], "text": ["shoe", "oven", "fridge", "desk", "tree"]}},
        {"id": "c2", "question": "What do you write with?", "question_concept": "write", "answerKey": "A",
         "choices": {"label": [*LETTERS, "E"], "text": ["pen", "sock", "spoon", "cloud", "hat"]}},
    ],
}  # fmt: skip
HUB_ROWS["arc_challenge"] = HUB_ROWS["arc_easy"]


# The same questions in the uniform layout (question, choices, answer), as a local folder holds them.
UNIFORM_ROWS = {
    "piqa": [
        {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "answer": row["label"]}
        for row in HUB_ROWS["piqa"]
    ],
    "hellaswag": [
        {"question": "Rowing: Two men sit in a boat. the taller man", "answer": 0,
         "choices": ["lifts both oars.", "eats the lake.", "is a boat.", "paints the sky red with an oar."]},
        {"question": "Home and Garden: How to prune a rose. Wait for spring. Roses rest in winter.", "answer": 0,
         "choices": ["Cut above a bud.", "Burn the bed.", "Sing loudly.", "Sell it."]},
        {"question": "Chess: A girl moves a pawn. she", "answer": 2,
         "choices": ["waits.", "flies away over the board.", "melts.", "is a pawn."]},
    ],
    "winogrande": [
        {"question": row["sentence"], "choices": [row["option1"], row["option2"]], "answer": int(row["answer"]) - 1}
        for row in HUB_ROWS["winogrande"]
    ],
    "arc_easy": [
        {"question": row["question"], "choices": row["choices"]["text"], "answer": answer}
        for row, answer in zip(HUB_ROWS["arc_easy"], (2, 1, 0), strict=True)
    ],
    "openbookqa": [
        {"question": row["question_stem"], "choices": row["choices"]["text"], "answer": answer}
        for row, answer in zip(HUB_ROWS["openbookqa"], (1, 3), strict=True)
    ],
    "boolq": [
        {"question": row["question"] + "?", "choices": ["false", "true"], "answer": row["label"],
         "passage": row["passage"]}
        for row in HUB_ROWS["boolq"]
    ],
    "social_iqa": [
        {"question": row["question"], "choices": [row["answerA"], row["answerB"], row["answerC"]],
         "answer": int(row["label"]) - 1, "context": row["context"]}
        for row in HUB_ROWS["social_iqa"]
    ],
    "commonsense_qa": [
        {"question": row["question"], "choices": row["choices"]["text"], "answer": answer}
        for row, answer in zip(HUB_ROWS["commonsense_qa"], (2, 0), strict=True)
    ],
}  # fmt: skip
UNIFORM_ROWS["arc_challenge"] = UNIFORM_ROWS["arc_easy"]


@pytest.mark.parametrize("task", TASKS)
def test_both_layouts_give_the_same_texts(task):
    assert len(HUB_ROWS[task]) == len(UNIFORM_ROWS[task])
    for hub, uniform in zip(HUB_ROWS[task], UNIFORM_ROWS[task], strict=True):
        assert is_uniform(uniform)
        assert not is_uniform(hub)
        of_hub, of_uniform = to_example(hub, task, "x"), to_example(uniform, task, "x")
        assert of_hub.contexts == of_uniform.contexts
        assert of_hub.continuations == of_uniform.continuations
        assert (of_hub.answer, of_hub.normalizers) == (of_uniform.answer, of_uniform.normalizers)


def test_texts_are_lm_evals():
    def first(task, index=0):
        example = to_example(HUB_ROWS[task][index], task)
        return example.contexts[example.answer], example.continuations[example.answer]

    assert first("piqa") == ("Question: Keep bread fresh.\nAnswer:", " Put it in a closed tin.")
    assert first("hellaswag") == ("Rowing: Two men sit in a boat. The taller man", " lifts both oars.")
    assert first("hellaswag", 1)[0] == ("Home and Garden: How to prune a rose. Wait for spring. Roses rest in winter.")
    assert first("winogrande") == ("Ann lent Mia a coat because Mia", " was cold.")
    assert first("winogrande", 1) == ("Tom asked Bob about Bob", " 's new job at the mill.")
    assert first("arc_easy", 1) == ("Question: What pulls a stone down?\nAnswer:", " gravity")
    assert first("openbookqa", 1) == ("Bees carry", " pollen")
    assert first("boolq", 1) == (
        "Whales are mammals.\nThey surface for air.\nQuestion: do whales breathe air?\nAnswer:",
        " yes",
    )
    assert first("social_iqa") == ("Q: Lea broke a vase. How would Lea feel?\nA:", " sorry")
    assert first("commonsense_qa") == (
        "Question: Where do you keep milk?\nA. shoe\nB. oven\nC. fridge\nD. desk\nE. tree\nAnswer:",
        " C",
    )


def test_boolq_has_one_question_mark_whether_or_not_the_row_has_one_and_needs_no_passage():
    row = {"question": "is it so", "choices": ["false", "true"], "answer": 1}
    for question in ("is it so", "is it so?"):
        assert to_example({**row, "question": question}, "boolq").contexts[0] == "Question: is it so?\nAnswer:"
    google = {"question": "is it so", "passage": "It is.", "answer": True}
    assert to_example(google, "boolq").answer == 1
    assert to_example(google).continuations == (" no", " yes")


def test_a_task_never_heard_of_takes_the_generic_form_and_loses_no_passage():
    row = {"id": "q7", "question": "Which floats?", "choices": ["cork", "lead"], "answer": 0}
    example = to_example(row, "my_own_task")
    assert example.id == "q7"
    assert example.contexts == ("Question: Which floats?\nAnswer:",) * 2
    assert example.continuations == (" cork", " lead")
    assert example.normalizers == (4, 4)
    with_passage = to_example({**row, "passage": "Cork is light."}, "my_own_task")
    assert with_passage.contexts[0] == "Cork is light.\nQuestion: Which floats?\nAnswer:"


@pytest.mark.parametrize("task", [name for name in TASKS if name != "arc_challenge"])
def test_hub_columns_show_the_task(task):
    assert detect_task(HUB_ROWS[task][0]) == task
    assert to_example(HUB_ROWS[task][0]) == to_example(HUB_ROWS[task][0], task)


def test_white_space_at_the_end_of_a_context_moves_to_the_continuation():
    assert scored_pair("stem \n", " word") == ("stem", " \n word")
    assert scored_pair("stem", " word") == ("stem", " word")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", {"label": -1}, "no label under 'label'"),
        ("piqa", {"label": 2}, "between 0 and 1"),
        ("piqa", {"goal": None}, "text under 'goal'"),
        ("piqa", {"sol2": " "}, r"\[sol1, sol2\]\[1\]"),
        ("winogrande", {"answer": ""}, "no label under 'answer'"),
        ("winogrande", {"answer": "0"}, "between 1 and 2"),
        ("winogrande", {"sentence": "no gap here"}, "blank '_'"),
        ("arc_easy", {"answerKey": ""}, "no label under 'answerKey'"),
        ("arc_easy", {"answerKey": "E"}, "one of"),
        ("hellaswag", {"label": ""}, "no label under 'label'"),
        ("hellaswag", {"endings": ["one"]}, "at least two texts"),
        ("piqa", {"label": 0.9}, "expected a whole number under 'label', got 0.9"),
        ("piqa", {"label": float("nan")}, "expected a whole number"),
        ("piqa", {"label": float("inf")}, "expected a whole number"),
        ("piqa", {"label": 2**70}, "between 0 and 1"),
        ("piqa", {"label": "0.9"}, "expected a whole number"),
        ("piqa", {"label": "1_0"}, "expected a whole number"),
        ("piqa", {"label": [0]}, "expected a whole number"),
        ("piqa", {"label": "-1"}, "no label under 'label'"),
        ("piqa", {"sol2": "Put it in a closed tin. "}, "the right choice 'Put it in a closed tin.' is there more than"),
        ("winogrande", {"option1": "Mia"}, "the right choice 'Mia' is there more than once"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}}, "a label of its own for each of 2"),
        ("arc_easy", {"choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}}, "a label of its own for each of 3"),
        ("arc_easy", {"choices": {"text": ["a", "b", "c"], "label": ["A", "C", "C"]}}, "a label of its own"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": 3}}, "under 'choices.label', got 3"),
        ("arc_easy", {"choices": {"text": ["a", "b", "b"], "label": ["A", "B", "C"]}}, "the right choice 'b' is there"),
        (
            "commonsense_qa",
            {
                "choices": {
                    "text": list("abcdefghijklmnopqrstuvwxyz") + ["0"],
                    "label": [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "27"],
                }
            },
            "at most 26 choices, one a letter, got 27",
        ),
    ],
)
def test_a_hub_row_that_does_not_fit_says_why(task, change, message):
    with pytest.raises(RowError, match=message):
        to_example({**HUB_ROWS[task][0], **change}, task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "between 0 and 1"),
        ({"answer": "A"}, "0-based index"),
        ({"answer": True}, "0-based index"),
        ({"answer": None}, "no label"),
        ({"choices": "cork"}, "at least two texts"),
        ({"choices": ["cork", 3]}, r"choices\[1\], got 3"),
        ({"question": 3}, "text under 'question', got 3"),
        ({"answer": 0.9}, "0-based index"),
        ({"answer": 2**70}, "between 0 and 1"),
        ({"choices": ["cork", "cork"]}, "the right choice 'cork' is there more than once; remove or reword the other"),
        ({"choices": ["cork", "lead", "lead"]}, "the choice 'lead' is there more than once; remove or reword one"),
    ],
)
def test_a_uniform_row_that_does_not_fit_says_why(change, message):
    with pytest.raises(RowError, match=message):
        to_example({"question": "Which floats?", "choices": ["cork", "lead"], "answer": 0, **change})


def test_published_sets_may_have_two_wrong_choices_alike():
    row = {"question": "A bee carries", "choices": ["pollen", "rocks", "rocks"], "answer": 0}
    assert to_example(row, "openbookqa").answer == 0


@pytest.mark.parametrize("label", [1, True, 1.0, "1", "1.0", " 1", "true", "True"])
def test_a_label_is_read_however_tables_write_it(label):
    assert to_example({**HUB_ROWS["boolq"][0], "label": label}, "boolq").answer == 1


def test_columns_that_fit_no_layout_are_listed():
    with pytest.raises(RowError, match=r"goal, sol1, sol2 \(hub\), got text"):
        to_example({"text": "a"}, "piqa")
    with pytest.raises(RowError, match="'false', 'true'"):
        to_example({"question": "q", "choices": ["true", "false"], "answer": 0}, "boolq")


def test_an_unknown_task_name_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        check_task("helaswag", "eval.tasks[0]")
