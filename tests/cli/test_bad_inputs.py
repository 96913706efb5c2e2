"""Bad input of every kind: one clear sentence, an exit code, and nothing lost.

Each row is a name, what lies in the folder (beside a tiny model, good questions and a finished
run), the command, and the sentence. A fuzz test beside this one looks for what has no row yet.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grath_utils.cli import main
from grath_utils.config import load_config
from grath_utils.course.notebooks import open_notebook_run, run_parameters
from grath_utils.errors import ConfigError, UsageError
from grath_utils.files import read_json, write_json, write_jsonl
from grath_utils.loop.run_dir import Run

FOLDER, GONE = "a folder", "nothing"  # instead of a file
TINY = "model.name=./tiny model.dtype=float32 model.device=cpu"
PAIR = '{"id": "q1", "question": "Why?", "correct": "So.", "incorrect": "No.", "iteration": 0}'
TWO = {"p.jsonl": PAIR + "\n" + PAIR.replace("q1", "q2").replace("Why", "How")}


@dataclass(frozen=True)
class Bad:
    name: str
    command: str
    message: str
    """A regular expression."""
    files: dict[str, object] = field(default_factory=dict)
    """Text, bytes, FOLDER or GONE; a dict changes keys of the JSON that is there."""
    code: int = 2


def question(name: str, text: str | bytes, message: str) -> list[Bad]:
    """Return a bad line in a question file, and one without any other, which may be skipped."""
    name, content = f"question: {name}", text if isinstance(text, bytes) else text.encode()
    files = {"q.jsonl": b'{"question": "Why?"}\n' + content}
    return [
        Bad(name, PAIRS, f"q.jsonl, line 2: .*{message}", files),
        Bad(
            f"{name}, skipped", f"{PAIRS} --skip-bad", "q.jsonl: no question", {"q.jsonl": content}
        ),
    ]


def run_file(name: str, file: str, content: object, message: str, command: str = "report", **more):
    """Return a run directory with a damaged file (and no manifest, which would notice that)."""
    files = {"run/manifest.json": GONE, f"run/{file}": content}
    return Bad(f"run: {name}", f"{command} --run-dir run", message, files, **more)


PAIRS = "pairs --model ./tiny --questions q.jsonl --out out.jsonl"
EVALUATE = "evaluate --benchmark probe --limit 2 --out r.json --model"
LINES = '{"question": "Why?"}\n{"question": "What?"}\n'
GRID = "sweep grid.yaml --plan --out sweep"
ROWS = [
    # --- what is asked for -----------------------------------------------------------------------
    Bad("no command", "", "name a command"),
    Bad("unknown command", "evalute", 'no command "evalute"; did you mean "evaluate"'),
    Bad("unknown option", "status --run-dri x", 'no option --run-dri; did you mean "--run-dir"'),
    Bad("a word too many", "run runs/cpu", "no use for 'runs/cpu'; a run directory comes after"),
    Bad("a list of nothing", "ls modess", 'nothing of the kind "modess"; did you mean "modes"'),
    Bad("no name for a profile", "init mine", "mine is no name for a profile; end it in .yaml"),
    Bad("a profile that is there", "init mine.yaml", "is there already", {"mine.yaml": "seed: 1"}),
    Bad("several into one file", "evaluate --benchmark probe retention --out r.json",
        "r.json is one file, and 2 benchmarks are asked for: name a folder, such as r,"),
    Bad("one of several", "evaluate --benchmark probe retenton --out r", 'mean "retention"'),
    Bad("arguments after --", "status --run-dir run -- x", 'only the command "sweep"'),
    Bad("unknown profile", "options --profile cpuu", 'did you mean "cpu"'),
    Bad("unknown key", "run --set dpo.bta=1", 'unknown key "dpo.bta" in the overrides; did you'),
    Bad("no value", "run --set dpo.beta", "expected key=value in the overrides, found 'dpo.beta'"),
    Bad("no key", "run --set =3", "expected key=value in the overrides, found '=3'"),
    Bad("twice", "run --set seed=1 seed=2", '"seed" is given twice'),
    Bad("text for a number", "run --set dpo.beta=much", "\"dpo.beta\" is 'much'; expected a num"),
    Bad("NaN", "run --set dpo.beta=.nan", '"dpo.beta" is not a number'),
    Bad("infinity", "run --set dpo.beta=1e400", '"dpo.beta" is inf; it must be finite'),
    Bad("endless digits", f"run --set seed={'9' * 5000}", r"not valid YAML \(Exceeds the limit"),
    Bad("huge", "run --set dpo.steps=99999999999", '"dpo.steps" is 99999999999; the most is 2147'),
    Bad("a date", "run --set seed=2020-99-01", "\"seed\" is '2020-99-01'; expected a whole number"),
    Bad("open bracket", "run --set lora.targets=[a", '"lora.targets", line 1: not valid YAML'),
    Bad("open quote", "run --set 'lora.targets=\"a'", '"lora.targets", line 1: not valid YAML'),
    Bad("half a pair", r"""run --set 'model.name="\ud800"'""",
        r'"model.name" is .*ud800.*; expected text'),
    Bad("negative seed", "run --seed -1", '"seed" is -1'),
    Bad("no seed", "run --seed one", "\"seed\" is 'one'; expected a whole number"),
    Bad("seed of evaluate", "evaluate --benchmark probe --seed -1 --out r.json", '"seed" is -1'),
    Bad("limit 0", "evaluate --benchmark probe --limit 0 --out r.json", "--limit is 0"),
    Bad("two limits", "evaluate --benchmark probe --limit 4 --set evaluation.limit=3 --out r.json",
        "both --limit and --set evaluation.limit say how many"),
    Bad("two limits of pairs", f"{PAIRS} --limit 4 --set questions.limit=3",
        "both --limit and --set questions.limit say how many"),
    Bad("no prompt file", f"{PAIRS} --mode paper --set pairs.prompt_file=absent.yaml",
        "absent.yaml: no such file", {"tiny/model.safetensors": "not looked at"}),
    Bad("unknown benchmark", "evaluate --benchmark prob --out r.json", 'did you mean "probe"'),
    Bad("dry run of an unknown benchmark", "run --dry-run --set evaluation.benchmarks=prob",
        '"evaluation.benchmarks": unknown benchmark "prob"; did you mean "probe"'),
    Bad("unknown tracker", "run --dry-run --set dpo.report_to=tensorbord",
        '"dpo.report_to" names "tensorbord"; did you mean "tensorboard"'),
    Bad("unknown mode", "run --run-dir new --set pairs.mode=defualt", 'did you mean "default"'),
    Bad("unknown platform", "classroom --to c --platform amiga", 'unknown platform "amiga"'),
    Bad("unknown notebook", "checkpoint --at 99", 'there is no notebook "99"'),
    Bad("rounds", "merge --model run@7 --to m", 'run@7": round 8 has no adapter'),
    Bad("no round", "merge --model run@x --to m", "after @ comes `base`, or a number"),
    Bad("mode of pairs", f"{PAIRS} --mode papr", '--mode cannot be "papr"; did you mean "paper"'),
    Bad("type of weights", "merge --model run@0 --to m --dtype flot32", 'did you mean "float32"'),
    # --- what leaves a run -----------------------------------------------------------------------
    Bad("push: no run", "push nowhere --to me/x", "nowhere holds no run"),
    Bad("push: no round", "push run@7 --to me/x", 'run@7": round 8 has no adapter'),
    Bad("push: no repository", "push run --to '' --dry-run", '"" is no name for a repository'),
    Bad("push: not there", "push run --to a/b/c --dry-run", '"a/b/c" is no name for a repository'),
    Bad("push: two things", "push run --to me/x --merged --pairs", "not allowed with argument"),
    Bad("push: nobody else's", "push run --to me/x --dry-run", "base model on this machine alone"),
    Bad("push: type of weights", "push run --to me/x --dtype flot32", 'did you mean "float32"'),
    Bad("export: no pairs", "export absent.jsonl --to e.jsonl", "absent.jsonl holds no run"),
    Bad("export: no round", "export run@x --to e.jsonl", "after @ comes `base`, or a number"),
    Bad("export: form", "export run --to e.jsonl --form plian", 'form cannot be "plian"; did you'),
    Bad("export: half a pair", "export p.jsonl --to e.jsonl", "p.jsonl, pair 2",
        {"p.jsonl": PAIR + "\n" + PAIR.replace('"So."', "null").replace("q1", "q2")}),
    Bad("export: its input", "export p.jsonl --to p.jsonl", "p.jsonl is read by this command", TWO),
    Bad("export: a run's own", "export run --to run/iter_0/pairs.jsonl", "belongs to the run in"),
    Bad("export: another's", "export run --to notes.txt", "was not written by this command",
        {"notes.txt": "mine"}),
    # --- profiles --------------------------------------------------------------------------------
    *(
        Bad(f"profile: {name}", f"run --profile p.yaml {more}", message, {"p.yaml": content})
        for name, content, message, more in (
            ("no section", "dpo: 3", '"dpo" holds 3; expected keys below it', ""),
            ("no section, --set", "dpo: 3", '"dpo" holds 3; expected', "--set dpo.beta=0.1"),
            ("UTF-16", "seed: 3".encode("utf-16"), "p.yaml, line 1: not UTF-8", ""),
            ("latin-1", "a: 1\n# é".encode("latin-1"), "p.yaml, line 2: not UTF-8", ""),
            ("NUL", "seed: 0\0", "p.yaml: not valid YAML .special characters are not all", ""),
            ("empty", "", "p.yaml: expected `key: value` lines, found nothing", ""),
            ("a list", "[1, 2]", "p.yaml: expected `key: value` lines, found a list", ""),
            ("within itself", "dpo: &a [*a]", '"dpo" holds', ""),
            ("a tag", "dpo: !!python/object:os.system {}", "line 1: could not determine", ""),
            ("twice", "seed: 0\nseed: 1", 'p.yaml, line 2: "seed" is given twice', ""),
            ("deep", "dpo: " + "[" * 5000, "p.yaml: not valid YAML .maximum recursion", ""),
            ("a folder", FOLDER, "p.yaml: is a folder, expected a file", ""),
            ("absent", GONE, "p.yaml: no such file", ""),
        )
    ),
    # --- questions -------------------------------------------------------------------------------
    *question("no JSON", '{"question": \n', "not valid JSON"),
    *question("no text", '{"question": 3}\n', "holds int, expected text"),
    *question("half of a surrogate pair", '{"question": "\\ud800"}\n', "half of a surrogate pair"),
    *question("a number of 5000 digits", f'{{"question": {"9" * 5000}}}\n', "4300 digits"),
    *question("deep", f'{{"question": {"[" * 100_000}\n', "too many brackets"),
    *question("NaN", '{"question": NaN}\n', "NaN or infinity"),
    *question("choices of nothing", '{"question": "A?", "choices": {"text": null}}\n',
              "choices.text"),
    *question("no UTF-8", b'{"question": "\xe9?"}\n', "not UTF-8 text"),
    *question("zero width", '{"question": "\u200b"}\n', '"question" is empty'),
    Bad("the same question", PAIRS, "q.jsonl, line 2: the same question as .*line 1",
        {"q.jsonl": LINES.replace("at?", "y? ")}),
    Bad("two columns of a name", PAIRS.replace("q.jsonl", "q.csv"),
        'q.csv, line 1: 2 columns are called "question"',
        {"q.csv": "question,question\na,b\nc,d\n"}),
    Bad("no questions", PAIRS, "q.jsonl: no question", {"q.jsonl": ""}),
    # --- outputs and inputs ----------------------------------------------------------------------
    Bad("out is a folder", "evaluate --model ./tiny --benchmark probe --limit 2 --out d",
        "d is a folder", {"d/thesis.tex": "x"}),
    Bad("out is here", "pairs --model ./tiny --questions good.jsonl --out .", "folder"),
    Bad("out is the input", "pairs --model ./tiny --questions good.jsonl --out good.jsonl",
        "good.jsonl is read by this command"),
    Bad("out is another's", "evaluate --model ./tiny --benchmark probe --limit 2 --out notes.txt",
        "was not written by this command", {"notes.txt": "mine"}),
    Bad("out below a file", "pairs --model ./tiny --questions good.jsonl --out notes.txt/p.jsonl",
        "notes.txt is a file", {"notes.txt": "mine"}),
    Bad("train to a file", "train --model ./tiny --pairs p.jsonl --out notes.txt",
        "notes.txt is a file; name a folder",
        {"p.jsonl": PAIR, "notes.txt": "mine"}),
    Bad("merge to a full folder", "merge --model run@0 --to d", "d is a folder that is not empty",
        {"d/thesis.tex": "x"}),
    Bad("a run in another folder", f"run --no-notebooks --run-dir d --set {TINY}",
        "d is not empty and holds no run.json", {"d/thesis.tex": "x"}),
    Bad("a run in a file", f"run --no-notebooks --run-dir notes.txt --set {TINY}", "notes.txt",
        {"notes.txt": "mine"}),
    Bad("no pairs", "train --pairs absent.jsonl --out t", "absent.jsonl: no such file"),
    Bad("half a pair of answers", "train --model ./tiny --pairs p.jsonl --out t", "p.jsonl, pair 2",
        {"p.jsonl": PAIR + "\n" + PAIR.replace('"So."', "null").replace("q1", "q2")}),
    Bad("one pair", "train --model ./tiny --pairs p.jsonl --out t", "1 .* cannot be split into",
        {"p.jsonl": PAIR}),
    # --- models ----------------------------------------------------------------------------------
    Bad("unknown model", f"{EVALUATE} defualt",
        'unknown model "defualt"'),
    Bad("a folder without model", f"{EVALUATE} d",
        "d is without config.json, so not a model", {"d/x": ""}),
    Bad("offline", f"{EVALUATE} org/x", "org/x", code=1),
    Bad("damaged weights", f"{EVALUATE} ./tiny",
        'cannot load the weights of ".*tiny"', {"tiny/model.safetensors": "damaged"}),
    Bad("damaged adapter", f"{EVALUATE} run@0",
        "cannot load the adapter in .*iter_0/adapter",
        {"run/manifest.json": GONE, "run/iter_0/adapter/adapter_model.safetensors": ""}),
    Bad("adapter of a wrong kind", f"{EVALUATE} run@0",
        "cannot load the adapter in .*iter_0/adapter", {"run/manifest.json": GONE,
                    "run/iter_0/adapter/adapter_config.json": {"r": "many"}}),
    Bad("a layer that is not there", f"train --pairs p.jsonl --out t --set {TINY} lora.targets=[x]",
        "names layers that this model does not have: x; its linear layers are", code=1, files=TWO),
    Bad("the output head", f"train --pairs p.jsonl --out t --set {TINY} lora.targets=[lm_head]",
        r"cannot be adapted: lm_head .the output head.; its linear layers are", code=1, files=TWO),
    Bad("an optimiser that is not here", f"train --pairs p.jsonl --out t --set {TINY} "
        "dpo.optimizer=lomo", "dpo.optimizer=lomo cannot be used here", files=TWO),
    Bad("an optimiser of no one", f"train --pairs p.jsonl --out t --set {TINY} "
        "dpo.optimizer=adamm", "the trainer refuses these dpo settings", files=TWO),
    Bad("no smoothing", "train --pairs p.jsonl --out t --set dpo.loss=exo_pair", "above 0", TWO),
    Bad("half of all labels", "run --set dpo.loss=robust dpo.label_smoothing=0.5", "below 0.5"),
    # --- run directories -------------------------------------------------------------------------
    Bad("no run", "status --run-dir nowhere", "nowhere holds no run"),
    Bad("a file for a run", "report --run-dir good.jsonl", "good.jsonl holds no run"),
    Bad("another configuration", "run --no-notebooks --profile smoke --run-dir run",
        "run was made by another configuration"),
    Bad("changed by hand", "status --run-dir run", "is not as it was made",
        {"run/iter_0/pairs.jsonl": PAIR}, code=1),
    run_file("cut short", "run.json", "{", r"run.json is damaged.*line 1", "status", code=1),
    run_file("no object", "run.json", "[]", r"run.json is damaged", "status", code=1),
    run_file("wrong settings", "run.json", {"config": {"dpo": {"beta": "x"}}}, '"dpo.beta" is',
             "status"),
    run_file("newer", "run.json", {"schema_version": 99}, "a newer one", "status", code=1),
    run_file("wrong facts", "run.json", {"device": 3}, 'run.json: "device" is 3; expected an ob',
             code=1),
    run_file("manifest", "manifest.json", "[1]", "manifest.json is damaged. Delete it", code=1),
    run_file("pairs cut short", "iter_1/pairs.jsonl", PAIR[:9], "pairs.jsonl, line 1: not valid"),
    run_file("pairs of bytes", "iter_0/pairs.jsonl", b"\xff\0", "pairs.jsonl, line 1: not UTF-8"),
    run_file("no pairs", "iter_0/pairs.jsonl", "", "pairs.jsonl: no pair in it"),
    run_file("questions", "questions.jsonl", LINES, 'questions.jsonl, line 1: "split" is None'),
    run_file("evaluation", "evaluation/base/probe.json", {"metrics": {"mc1": 3}},
             'base/probe.json: "metrics.mc1" is 3; expected an object'),
    run_file("NaN", "evaluation/base/probe.json", '{"n": NaN}',
        "probe.json: not valid JSON .NaN or"),
    run_file("items", "evaluation/iter_1/probe.json", {"items": [{}]}, r'"items\[0\].id" is None'),
    run_file("signals", "signals/iter_0.json", {"kl": "x"}, 'iter_0.json: "kl" is \'x\'', "status"),
    run_file("log", "iter_0/training_log.jsonl", '{"step": "x"}', 'line 1: "step" is \'x\'; exp'),
    run_file("a folder", "signals/base.json", FOLDER, "base.json: is a folder", "status"),
    # --- sweeps ----------------------------------------------------------------------------------
    Bad("unknown grid", "sweep smoke_2x2 --plan --out s", 'did you mean "smoke_2x2x2"'),
    Bad("no grid", GRID, "expected `profile:` and `grid:`", {"grid.yaml": "[]"}),
    Bad("grid: key", GRID, 'unknown key "dpo.bta" in "grid"; did you mean',
        {"grid.yaml": "profile: smoke\ngrid: {dpo.bta: [1]}"}),
    Bad("grid: value", GRID, "point profile smoke, dpo.beta=.*expected a number",
        {"grid.yaml": "profile: smoke\ngrid: {dpo.beta: [x]}"}),
    Bad("grid: empty", GRID, '"seed" is .*; expected a list of values',
        {"grid.yaml": "profile: smoke\ngrid: {seed: []}"}),
    Bad("grid: endless", GRID, 'unknown key "dpo" in "grid"',
        {"grid.yaml": "profile: smoke\ngrid: &a {dpo: *a}"}),
    Bad("sweep in another folder", GRID.replace("--out sweep", "--out d"),
        "d is not empty and holds no points.json",
        {"grid.yaml": "profile: smoke\ngrid: {seed: [0, 1]}", "d/thesis.tex": "x"}),
]  # fmt: skip


@pytest.fixture
def place(
    tmp_path: Path, tiny_llama: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with a tiny model, good questions and a finished run."""
    shutil.copytree(tiny_llama, tmp_path / "tiny")
    shutil.copytree(small_run.path, tmp_path / "run")
    write_jsonl(tmp_path / "good.jsonl", [{"question": f"What is {i}?"} for i in range(4)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        write_json(path, {**read_json(path), **content})
        return
    path.unlink(missing_ok=True)
    if content is FOLDER:
        path.mkdir()
    elif content is not GONE:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_bad_input_is_one_sentence_and_costs_nothing(row: Bad, place: Path, capsys) -> None:
    for name, content in row.files.items():
        lay(place / name, content)
    before = contents(place)
    try:
        code = main(shlex.split(row.command))
    except SystemExit as stop:  # argparse
        code = stop.code
    err = capsys.readouterr().err
    assert code == row.code, err
    assert "Traceback" not in err
    assert sum("error: " in line for line in err.splitlines()) == 1, err
    assert re.search(row.message, err), err
    after = contents(place)
    assert {name: after.get(name) for name in before} == before


def test_there_are_many_and_each_has_its_name() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"PROFILE": 3}, "PROFILE is 3; expected text"),
        ({"PROFILE": "cpuu"}, 'unknown profile "cpuu"; did you mean "cpu"'),
        ({"RUN_DIR": None}, "RUN_DIR is None; expected text"),
        ({"RUN_DIR": 7}, "RUN_DIR is 7; expected text"),
        ({"SEED": None}, "SEED is None; expected a whole number"),
        ({"SEED": "1"}, "SEED is '1'; expected a whole number"),
        ({"SEED": 1.0}, "SEED is 1.0; expected a whole number"),
        ({"SEED": -1}, '"seed" is -1; the least is 0'),
        ({"OVERRIDES": 3}, "OVERRIDES is 3; expected text"),
        ({"OVERRIDES": ["dpo.beta=1"]}, "OVERRIDES is .*; expected text"),
        ({"OVERRIDES": "dpo.beta"}, "expected key=value in the overrides, found 'dpo.beta'"),
        ({"OVERRIDES": "dpo.beta='1"}, "cannot read the overrides"),
    ],
    ids=str,
)
def test_a_notebook_s_parameters_are_named(parameters: dict, message: str, tmp_path: Path) -> None:
    """As papermill's ``-p NAME VALUE`` gives them: 3 is a number, None is none."""
    given = {"PROFILE": "smoke", "RUN_DIR": str(tmp_path / "run"), "SEED": 0, "OVERRIDES": ""}
    with pytest.raises(UsageError, match=message):
        open_notebook_run(*{**given, **parameters}.values())
    assert not (tmp_path / "run").exists()


@given(
    model=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1),
    targets=st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1),
    rate=st.floats(1e-300, 1e300),
)
def test_the_settings_of_a_run_reach_its_notebooks(model, targets, rate) -> None:
    """Names in any script, emoji among them, and every digit of a number."""
    changed = {"model.name": model, "lora.targets": [*dict.fromkeys(targets)], "dpo.beta": rate}
    try:
        config = load_config("smoke", changed, seed=3)
    except ConfigError:  # all-linear beside others
        return
    parameters = run_parameters(Run(Path("run"), config))
    assert load_config("smoke", parameters["OVERRIDES"], seed=parameters["SEED"]) == config
