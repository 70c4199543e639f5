import importlib
import io
import json
import os
import re
import subprocess
import sys

import pytest

from tests.zoo.tasks import raw_glue, raw_superglue
from zoo import cli
from zoo.recipes import preset_recipe
from zoo.tasks.task import TASKS, recipe


def test_prepare_bad_folder(tmp_path, capsys):
    for tasks in ([], ["glue/cola"]):
        arguments = ["prepare", *tasks, "--from", str(tmp_path), "--data-dir", str(tmp_path / "o")]
        assert cli.main(arguments) == 2
        assert re.match(f"zoo: `source`.*source='{tmp_path}'", capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


def test_prepare_says_what_it_left_out(tmp_path, capsys):
    for task in raw_glue.GLUE[:2]:
        raw_glue.make(tmp_path / "raw", task)
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "raw" / raw_glue.FOLDERS["glue/sst2"] / name).unlink()
    arguments = ["prepare", "--from", str(tmp_path / "raw"), "--data-dir", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("glue/cola: ")
    (line,) = (line for line in lines if "glue/sst2" in line)
    assert line.startswith("left out: ") and "SST-2/train.tsv" in line
    assert re.match("left out: glue/wnli .*WNLI/train.tsv", lines[-1])


def test_prepare_superglue_and_partial_data(tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    folder = raw_superglue.make(tmp_path / "raw", "super_glue/boolq", tests=False)
    (folder / "partial").mkdir()
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").rename(folder / "partial" / f"{name}_some.jsonl")
    raw_superglue.make(tmp_path / "raw", "super_glue/rte")
    arguments = ["prepare", "--from", str(tmp_path / "raw"), "--data-dir", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("super_glue/rte: ")
    (line,) = (line for line in lines if "super_glue/boolq" in line)
    assert re.match("left out: super_glue/boolq .*BoolQ/train.jsonl.*`partial`", line)
    assert cli.main([*arguments, "--partial"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("super_glue/boolq: ")
    assert re.match(r" *train: 3\b.*partial", lines[1])


def test_prepare_into_a_file(tmp_path, capsys):
    raw_glue.make(tmp_path / "raw", "glue/cola")
    (tmp_path / "out").write_text("mine")
    arguments = ["prepare", "--from", str(tmp_path / "raw"), "--data-dir", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"zoo: `data_dir`.*'{tmp_path / 'out'}'\n", error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["glue/colla"], r"`task`.*'glue/cola'\?.*task='glue/colla'"),
        (["--model", "no/such/folder"], "`model`.*model='no/such/folder'"),
        (["--size", "huge"], "`size`.*size='huge'"),
        (["--epochs", "0"], "`epochs`.*epochs=0"),
        (["--seed", "-1"], "`seed`.*seed=-1"),
        (["--max-length", "999999"], "`max_length`.*max_length=999999"),
        (["--preset", "no/such/folder"], "`preset`.*preset='no/such/folder'"),
        (["--model", "dense", "--preset", os.curdir], "`model`.*preset.*model='dense'"),
        (["--train", "half"], "`train`.*train='half'"),
        (["--lora-rank", "2"], "`lora_rank`.*`train`.*lora_rank=2"),
        (["super_glue"], "`task`.*'superglue'.*task='super_glue'"),
        (["glue/rte", "--pairs", "both"], "`pairs`.*pairs='both'"),
        (["--seeds", "0"], "`seeds`.*seeds=0"),
        (["--seeds", "2", "--seed", "1"], "`seed`.*`seeds`.*seed=1"),
    ],
)
def test_finetune_bad_input(tmp_path, capsys, arguments, message):
    output = tmp_path / "run"
    assert cli.main(["finetune", *arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert re.match(f"zoo: {message}", error) and error.count("\n") == 1
    assert not output.exists()


SUMMARY = {
    "folder": "out",
    "suite": None,
    "tasks": {
        "glue/rte": {
            "metrics": ["accuracy"],
            "partial": [],
            "runs": [
                {
                    "seed": n,
                    "epochs": 3,
                    "seconds": 1.0,
                    "best": {"accuracy": n / 4},
                    "last": {"accuracy": 0},
                }
                for n in (1, 2)
            ],
            "best": {"accuracy": {"mean": 0.375, "sd": 0.125}},
            "last": {"accuracy": {"mean": 0.0, "sd": 0.0}},
        }
    },
    "averages": None,
    "left_out": {},
}


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["glue/rte", "--seeds", "2"], {"task": "glue/rte", "seeds": 2}),
        (["glue"], {"task": "glue", "seeds": [0]}),
        (["glue", "--seed", "3", "--train", "lora"], {"task": "glue", "seeds": [3]}),
        (
            ["glue", "--preset", "one", "--no-load-weights"],
            {"preset": "one", "load_weights": False},
        ),
        (["glue/rte", "--seeds", "2", "--pairs", "together"], {"seeds": 2, "pairs": "together"}),
        (["glue", "--preset", "one", "--no-mix-layers"], {"mix_layers": False}),
    ],
)
def test_finetune_over_seeds_or_tasks(capsys, monkeypatch, arguments, given):
    called = []
    monkeypatch.setattr(
        "zoo.finetuning.suite.finetune_suite", lambda **options: called.append(options) or SUMMARY
    )
    assert cli.main(["finetune", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| glue/rte | accuracy | 0.375 ± 0.125 | 0.000 ± 0.000 | 2 | 2 |" in lines
    assert lines[-1] == "saved: out"
    assert called[0].items() >= given.items() and "seed" not in called[0]
    assert called[0].get("train") == ("lora" if "lora" in arguments else None)
    assert ("load_weights" in called[0]) == ("--no-load-weights" in arguments)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {"capacity_factor": "default"}),
        (["--capacity-factor", "none"], {"capacity_factor": None}),
        (["--capacity-factor", "1.5", "--steps", "2"], {"capacity_factor": 1.5, "steps": 2}),
    ],
)
def test_pretrain_is_given_what_was_asked_for(capsys, monkeypatch, arguments, given):
    called = []
    results = {"history": [{"perplexity": 3.0}], "metrics": ["perplexity"], "preset": "out"}
    results["settings"] = {"steps": 2}
    monkeypatch.setattr(
        "zoo.pretraining.run.pretrain", lambda **options: called.append(options) or results
    )
    assert cli.main(["pretrain", "text.txt", *arguments]) == 0
    assert capsys.readouterr().out == "2 steps: perplexity 3.0000\nsaved: out\n"
    (options,) = called
    options.pop("verbose")
    assert options.pop("corpus") == ["text.txt"]
    assert {n: value for n, value in options.items() if value is not False} == given


def test_compare(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(SUMMARY))
    folders = [str(tmp_path / name) for name in ("one", "two")]
    assert cli.main(["compare", *folders]) == 0
    assert "| glue/rte | accuracy | 0.375 ± 0.177 |" in capsys.readouterr().out
    assert cli.main(["compare", *folders, "--epoch", "last"]) == 0
    assert "| glue/rte | accuracy | 0.000 ± 0.000 |" in capsys.readouterr().out
    assert cli.main(["compare", folders[0], str(tmp_path)]) == 2
    assert re.match(f"zoo: `folders`.*`summary.json`.*{tmp_path}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("scores", "arguments", "said"),
    [
        ({"f1": 0.5, "accuracy": 0.75}, ["--split", "test"], "f1 0.5000, accuracy 0.7500"),
        ({}, ["--predictions", "out"], "saved: out"),
        ({}, [], ".*labels.*--predictions.*"),
    ],
)
def test_evaluate(capsys, monkeypatch, scores, arguments, said):
    called = []
    monkeypatch.setattr(
        "zoo.finetuning.evaluate.evaluate", lambda **options: called.append(options) or scores
    )
    assert cli.main(["evaluate", "folder", "glue/mrpc", *arguments]) == 0
    assert re.fullmatch(f"{said}\n", capsys.readouterr().out)
    given = dict(zip((n.removeprefix("--") for n in arguments[::2]), arguments[1::2], strict=True))
    assert called == [{"preset": "folder", "task": "glue/mrpc", **given}]


def test_evaluate_bad_input(tmp_path, capsys):
    for arguments, message in (
        (["no/such/folder", "glue/cola"], "`preset`.*preset='no/such/folder'"),
        ([str(tmp_path), "glue/coal"], "`task`.*task='glue/coal'"),
    ):
        assert cli.main(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err
        assert re.match(f"zoo: {message}", error) and error.count("\n") == 1


def test_folder_without_the_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: False, raising=False)
    arguments = [
        "finetune",
        "glue/rte",
        "--data-dir",
        str(tmp_path),
        "--output",
        str(tmp_path / "r"),
    ]
    assert cli.main(arguments) == 2
    assert "python -m zoo prepare" in capsys.readouterr().err


def test_a_mesh_of_more_devices_than_there_are(tmp_path):
    backend = os.environ["KERAS_BACKEND"]
    command = [sys.executable, "-m", "zoo", "finetune", "--backend", backend]
    command += ["--output", str(tmp_path), "--mesh", "data=4,expert=4"]
    environment = dict(os.environ)
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # the command's own
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    what = "`ExpertParallel`.*torch" if backend == "torch" else "data=4, experts=4, model=1"
    assert re.search(what, done.stderr)


@pytest.mark.parametrize("mesh", ["data", "data=2,data=4", "experts=-1", "rows=2", ""])
def test_what_is_no_mesh(mesh, capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--mesh", mesh])
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f" --mesh: .*data=2,expert=4.*Received: {mesh}$", error)


def test_missing_backend(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["finetune"]) == 2
    assert "pip install 'keras-moe[" in capsys.readouterr().err


def test_interrupt(tmp_path, capsys, monkeypatch):
    import zoo.finetuning.run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo.finetuning.run, "finetune", interrupted)
    monkeypatch.setattr(importlib.import_module("zoo.tasks.prepare"), "prepare", interrupted)
    assert cli.main(["finetune"]) == 130
    assert re.fullmatch("zoo: .*finetune.*--restart.*\n", capsys.readouterr().err)
    folder = str(tmp_path)
    assert cli.main(["prepare", "glue/rte", "--from", folder, "--data-dir", folder]) == 130
    assert re.fullmatch("zoo: .*prepare.*--force.*\n", capsys.readouterr().err)


def test_help_has_the_tasks_and_the_defaults_of_each(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for task in TASKS:
        (line,) = (line for line in lines if re.match(rf"  {task} +\d", line))
        preset = preset_recipe(task, sparse=True)
        of_task = ("epochs", "max_length")
        expected = [*recipe(task).values(), *(preset[name] for name in of_task)]
        assert [float(figure) for figure in line.split()[1:]] == expected
    (line,) = (line for line in lines if line.startswith("sparse presets: "))
    for name, value in preset.items():
        if name not in (*of_task, "pairs", "mix_layers"):
            assert f"{name.replace('_', ' ')} {value}" in line
    (line,) = (line for line in lines if line.startswith("dense presets: "))
    assert "expert" not in line and "learning rate 0.002" in line


def say(lines, then="pass"):
    """A command in which an import writes lines to the descriptor that TensorFlow writes to."""
    text = "".join(f"{line}\n" for line in lines)
    return f"""
import os, sys, types
from zoo import cli

class Module(types.ModuleType):
    @property
    def evaluate(self):
        os.write(2, {text.encode()!r})
        {then}
        return lambda **options: {{"accuracy": 0.5}}

sys.modules["zoo.finetuning"] = types.ModuleType("zoo.finetuning")
sys.modules["zoo.finetuning.evaluate"] = Module("zoo.finetuning.evaluate")
cli.main(["evaluate", "folder", "glue/rte"])
os.write(2, b'after\\n')
"""


REMARKS = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1.2    7955 port.cc:153] oneDNN custom operations are on.",
    "I0000 00:00:1.2    7955 cudart_stub.cc:31] Could not find cuda drivers on your machine.",
]
TROUBLE = [
    "W0000 00:00:1.2    7955 file.cc:1] a warning",
    "E0000 00:00:1.2    7955 file.cc:1] an error",
    "It is 5 o'clock.",
]


@pytest.mark.every_backend
@pytest.mark.parametrize(
    ("then", "code", "last"),
    [
        ("pass", 0, "after"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("os.abort()", -6, TROUBLE[-1]),
    ],
)
def test_remarks_are_dropped_and_trouble_is_not(then, code, last):
    program = say([*REMARKS, *TROUBLE], then)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines[:3] == TROUBLE and lines[-1] == last
    assert done.stdout == ("accuracy 0.5000\n" if code == 0 else "")


def test_unknown_command_and_backend_exit_with_2():
    for arguments in (["fly"], ["finetune", "--backend", "numpy"], []):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2


def test_command_line_trains_the_embedded_default_on_the_backend_asked_for(tmp_path):
    """The whole path in a process of its own, without what Keras and JAX set here."""
    environment = {name: x for name, x in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    environment["KERAS_BACKEND"] = "jax" if backend == "torch" else "torch"
    command = [sys.executable, "-m", "zoo", "finetune", "--backend", backend, "--epochs", "1"]
    command += ["--max-examples", "64", "--max-length", "8", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("acceptability: ")
    assert re.search("epoch 1 .*: val_matthews", done.stdout)
    assert done.stderr == ""
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["backend"] == backend


WIDTHS = {"num_layers": 2, "hidden_dim": 8, "intermediate_dim": 12}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A tiny text-to-text model, of a kind that transformers has, too."""
    import keras_moe
    import zoo

    router = keras_moe.SwitchRouter(capacity_factor=None, eval_capacity_factor=None)
    backbone = zoo.switch_transformer(
        "mini", 2, None, router, gated=False, activation="relu", num_decoder_layers=2, **WIDTHS
    )
    folder = tmp_path_factory.mktemp("cli") / "preset"
    preprocessor = zoo.Seq2SeqLMPreprocessor(zoo.t5_tokenizer(zoo.default_tokenizer().proto), 8, 6)
    zoo.save_preset(zoo.Seq2SeqLM(backbone, preprocessor), folder)
    return folder


def run(*arguments):
    """On the backend of the tests, which is loaded already."""
    return cli.main([*map(str, arguments), "--backend", os.environ["KERAS_BACKEND"]])


def test_convert_there_and_back_and_generate(preset, tmp_path, capsys):
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert run("convert", preset, theirs, "--to", "transformers") == 0
    assert json.loads((theirs / "config.json").read_text())["model_type"] == "switch_transformers"
    assert run("convert", theirs, back, "--to", "keras", "--dtype", "auto") == 0
    assert capsys.readouterr().out == f"saved: {theirs}\nsaved: {back}\n"
    said = []
    for folder in (preset, theirs, back):
        assert run("generate", folder, "a <extra_id_0> fox", "the dog", "--max-length", 5) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and said[0].count("\n") == 2


def test_texts_may_follow_options(preset, capsys):
    assert run("generate", preset, "--max-length", 4, "a fox", "the dog") == 0
    assert capsys.readouterr().out.count("\n") == 2
    for *arguments, unknown in (
        ("generate", preset, "--length", 4, "a", "--length"),
        ("presets", "all", "all"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main([*map(str, arguments)])
        assert exit.value.code == 2
        assert re.search(f"error: .*: {unknown}", capsys.readouterr().err)


def test_generate_reads_lines_and_takes_a_sampler(preset, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a fox\nthe dog\n"))
    options = ("--max-length", 4, "--sampler", "beam", "--dtype", "bfloat16")
    assert run("generate", preset, *options) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_generate_prints_batches_as_they_finish(preset, capsys, monkeypatch):
    from zoo.models.encoder_decoder import Seq2SeqLM

    generate, batches = Seq2SeqLM.generate, []

    def noted(model, texts, **options):
        batches.append((len(texts), capsys.readouterr().out.count("\n")))
        return generate(model, texts, **options)

    monkeypatch.setattr(Seq2SeqLM, "generate", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\nd\ne\n"))
    assert run("generate", preset, "--batch-size", 2, "--max-length", 3) == 0
    assert batches == [(2, 0), (2, 2), (1, 2)] and capsys.readouterr().out.count("\n") == 1


def test_generate_looks_for_a_tokenizer_before_the_weights(preset, tmp_path, capsys, monkeypatch):
    import zoo

    model = zoo.from_preset(preset)
    zoo.save_transformers(model, tmp_path / "theirs")
    (tmp_path / "theirs" / "spiece.model").unlink()
    model.backbone.save_to_preset(str(tmp_path / "backbone"))
    encoder = zoo.EncoderBackbone(**WIDTHS, vocabulary_size=10, num_heads=1, key_dim=4)
    zoo.EncoderTextClassifier(encoder, 2).save_to_preset(str(tmp_path / "classifier"))
    monkeypatch.setattr("zoo.presets.from_preset", None)
    for name, message in (
        ("theirs", "tokenizer"),
        ("backbone", "tokenizer"),
        ("classifier", "language model"),
    ):
        assert run("generate", tmp_path / name, "a") == 2
        error = capsys.readouterr().err
        assert re.fullmatch(f"zoo: `preset`.*{message}.*'{tmp_path / name}'\n", error)


def test_convert_writes_what_is_known_into_the_card(preset, tmp_path, monkeypatch):
    import zoo

    model = zoo.from_preset(preset)
    monkeypatch.setattr("zoo.presets.from_preset", lambda *args, **kwargs: model)
    name = "hf://google/switch-base-8@main"
    for number, (source, options, licence, data) in enumerate(
        (
            (name, (), "Apache-2.0", "C4, span corruption"),
            (name, ("--licence", "mine"), "mine", "C4, span corruption"),
            (preset, (), "not stated", "not stated"),
            (preset, ("--licence", "mine"), "mine", "not stated"),
            (preset, ("--training-data", "ours"), "not stated", "ours"),
        )
    ):
        target = tmp_path / str(number)
        assert run("convert", source, target, "--to", "keras", *options) == 0
        card = (target / "README.md").read_text()
        assert f"| licence | {licence} |" in card and f"| training data | {data}" in card


def test_generate_and_convert_bad_input(preset, tmp_path, capsys):
    for arguments, message in (
        (("generate", tmp_path / "none", "a"), f"`preset`.*preset='{tmp_path / 'none'}'"),
        (("generate", preset, "a", "--max-length", 0), "`max_length`.*max_length=0"),
        (("generate", preset, "a", "--batch-size", 0), "`batch_size`.*batch_size=0"),
        (("convert", preset, tmp_path, "--to", "keras"), f"`folder`.*folder='{tmp_path}'"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert re.match(f"zoo: {message}", error) and error.count("\n") == 1


def test_presets_are_listed(capsys):
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "switch-base-8 " in line]
    assert re.sub(" +", " ", line) == (
        "hf://google/switch-base-8 Switch Transformer 619M parameters, 223M active, "
        "size not known, Apache-2.0, C4, span corruption (https://arxiv.org/abs/1910.10683)"
    )
    (line,) = [line for line in lines if "t5-v1_1-small " in line]
    assert "about 308 MB, Apache-2.0, C4" in line
    (line,) = [line for line in lines if line.startswith("expert_choice_mini_en ")]
    assert "about 24 MB, CC-BY-SA-3.0, 786M tokens of English" in line
    assert len({re.search("Apache|CC-", line).start() for line in lines}) == 1
