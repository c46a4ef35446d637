"""A config is read whole or refused with one plain message."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horovod_lm.config import Config, known_keys, load_config, make_config, to_toml
from horovod_lm.errors import UserError
from horovod_lm.presets import preset

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def write(folder: Path, text: str, name: str = "my.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_config_of_the_project_is_valid(path):
    assert load_config(path).name == path.stem


def test_defaults_and_sections(tmp_path):
    config = load_config(write(tmp_path, "[train]\nsteps = 7\n[data]\nvocabulary = 999\n"))
    assert config.name == "my"
    assert config.train.steps == 7
    assert config.model.vocabulary == config.data.vocabulary == 999
    assert config.optimizer == Config().optimizer


def test_a_preset_is_the_default_of_its_model(tmp_path):
    config = load_config(write(tmp_path, "[model]\npreset = 'bert-base'\nlayers = 3"))
    base = preset("bert-base").spec
    assert config.model == base.model_copy(update={"layers": 3})
    assert config.data.vocabulary == config.model.vocabulary == 30522
    text = to_toml(config)
    assert "preset" not in text and 'kind = "encoder"' in text
    assert load_config(write(tmp_path, text)) == config


def test_a_vocabulary_that_is_given_wins_over_the_presets(tmp_path):
    path = write(tmp_path, "[model]\npreset = 'gpt2'\n[data]\nvocabulary = 900")
    config = load_config(path)
    assert config.data.vocabulary == config.model.vocabulary == 900
    assert config.model.width == 768
    config = load_config(path, ["data.vocabulary=901", "model.preset=t5-small", "model.heads=4"])
    assert config.model.vocabulary == 901
    assert (config.model.kind, config.model.heads) == ("encoder-decoder", 4)
    with pytest.raises(UserError, match=r"model\.vocabulary = 50257 differs from"):
        load_config(path, ["model.vocabulary=50257"])


def test_task_heads_are_read_back(tmp_path):
    text = "[model]\n[[model.task_heads]]\nname = 'label'\noutputs = 3\n"
    config = load_config(write(tmp_path, text + "[[model.task_heads]]\nname = 'b'\noutputs = 2"))
    assert [(h.name, h.outputs, h.over) for h in config.model.task_heads] == [
        ("label", 3, "sequence"), ("b", 2, "sequence"),
    ]  # fmt: skip
    assert load_config(write(tmp_path, to_toml(config))) == config


def test_a_whole_number_will_do_for_a_real_one(tmp_path):
    config = load_config(write(tmp_path, "[optimizer]\nlearning_rate = 1"))
    assert config.digest == load_config(write(tmp_path, "optimizer.learning_rate = 1.0")).digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3", "there is no key train.step; did you mean train.steps?"),
        ("[trian]\nsteps = 3", "there is no key trian; did you mean train?"),
        ("[model]\nprecision = 'fp32'", "no key model.precision; did you mean train.precision?"),
        ("[train]\nqqqqqq = 3", "there is no key train.qqqqqq"),
        (
            "[train]\nsteps = 'many'",
            "train.steps = 'many' is not allowed; it must be a whole number, at least 1, at most",
        ),
        ("[train]\nsteps = '200'", "train.steps = '200' is not allowed"),
        ("[train]\nsteps = true", "train.steps = True is not allowed"),
        ("[train]\nsteps = 2.5", "train.steps = 2.5 is not allowed"),
        ("[model]\ntied = 'yes'", "model.tied = 'yes' is not allowed; it must be true or false"),
        ("[model]\ndropout = nan", "model.dropout = nan is not allowed; it must be a number, at"),
        (
            "[train]\nmax_norm = -1",
            "train.max_norm = -1 is not allowed; it must be a number, above",
        ),
        (
            "[train]\nprecision = 'fp8'",
            "train.precision = 'fp8' is not allowed; it must be "
            """"fp64" or "fp32" or "bf16" or "fp16\"""",
        ),
        ("[data]\ntext = 'a.txt'", "data.text = 'a.txt' is not allowed; it must be a list of one"),
        ("[data]\ntext = []", "data.text = [] is not allowed; it must be a list of one or more"),
        ("[data]\ntext = [1]", "data.text.0 = 1 is not allowed; data.text must be a list of one"),
        ("train = 3", "train = 3 is not allowed; it must be a section of keys"),
        ("name = 'a/b'", "name = 'a/b' is not allowed; it must be a string, of 1 to 80 letters"),
        ("[model]\nvocabulary = 300", "model.vocabulary = 300 differs from data.vocabulary = 8192"),
        ("[model]\nwidth = 30\nheads = 4", "does not divide width = 30; use heads = 2 or 3 or 5"),
        ("[loss_scale]\ninitial = 0.5", "minimum = 1, initial = 0.5 and maximum = 1.67772e+07"),
        (
            "[model]\npreset = 'bert-bsae'",
            'model.preset: there is no preset "bert-bsae"; known: transformer-base, ',
        ),
        ("[model]\npreset = 3", "model.preset: there is no preset"),
        (
            "[data]\nformat = 'xml'",
            """data.format = 'xml' is not allowed; it must be "auto" or "text" or "jsonl" or""",
        ),
        (
            "[data]\nnormalise = ['nfq']",
            """data.normalise.0 = 'nfq' is not allowed; data.normalise must be a list of "nfc\"""",
        ),
        ("[data]\nsources = 3", "data.sources = 3 is not allowed; it must be a list of sections"),
        (
            "[data]\nsources = [3]",
            "data.sources.0 = 3 is not allowed; it must be a section of keys",
        ),
        (
            "[[data.sources]]\nname = 'a'\ntext = []",
            "data.sources.0.text = [] is not allowed; it must be a list of one or more strings",
        ),
        (
            "[[data.sources]]\nname = 'a'\ntext = ['a']\nweight = -1",
            "data.sources.0.weight = -1 is not allowed; it must be a number, at least 0",
        ),
        (
            "[[data.sources]]\nname='a'\ntext=['a']\n[[data.sources]]\nname='a'\ntext=['b']",
            'data: two sources are called "a"; give each a name of its own',
        ),
        (
            "[data]\ntext = ['a']\n[[data.sources]]\nname = 'a'\ntext = ['a']",
            "data: text belongs into each [[data.sources]] where there are some",
        ),
        (
            "[data]\nformat = 'jsonl'\ntarget = ['a.de']",
            """data: target = ['a.de'] is for running text, not for format = "jsonl"; leave""",
        ),
        (
            "[data]\nparallel = true\nfields = ['a']",
            "data: parallel = true takes two fields, a source and its target, and fields has 1",
        ),
        (
            "[data]\ntokenizer = 'my.json'\nsentinels = 3",
            "data: sentinels is for a tokenizer that is trained here; that of my.json is taken as",
        ),
        (
            "[data]\nvocabulary = 300\nsentinels = 100",
            "data: vocabulary = 300 has no room for sentinels = 100; it must be at least 362",
        ),
        (
            "[data]\nvocabulary = 256",
            "data: vocabulary = 256 is too small for a tokenizer that is trained; take",
        ),
        (
            "[data]\nvocabulary = 257\ntokenizer = 'wordpiece'",
            "data: vocabulary = 257 is too small; take at least 262",
        ),
        (
            "[[data.sources]]\ntext = ['a']",
            "data.sources.0.name is missing; it must be a string, of 1 to 40 letters, digits, - an",
        ),
        ("[[objective]]\nweight = 2", """objective.0.name is missing; it must be "causal_lm" or"""),
        ("steps", "is not valid TOML: "),
        ("[train]\nsteps = 3\nsteps = 4", "is not valid TOML: "),
    ],
)
def test_a_bad_file_is_refused_with_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("given", ["data.vocabulary = '8k'", "data.vocabulary = true", "data = 3"])
def test_a_fault_of_the_vocabulary_is_no_fault_of_the_model(tmp_path, given):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, f"{given}\n[model]\npreset = 'gpt2'"))
    (line,) = str(caught.value).splitlines()
    assert " is not allowed; it must be " in line and "model" not in line


def test_every_fault_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "[train]\nsteps = 0\nseed = -1\n[model]\nwidht = 3"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for key in ("train.steps", "train.seed", "model.widht"):
        assert any(key in line for line in lines)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no\.toml does not exist"):
        load_config(tmp_path / "no.toml")
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't be read: it is not UTF-8 text"):
        load_config(tmp_path / "binary.toml")


def test_a_file_name_that_is_no_name_of_a_run(tmp_path):
    assert load_config(write(tmp_path, "", "my größte run.toml")).name == "my-gr--te-run"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=9", "steps", 9),
        ("train.steps = 9", "steps", 9),
        ("train.precision=bf16", "precision", "bf16"),
        ('train.precision="bf16"', "precision", "bf16"),
        ("train.max_norm=0", "max_norm", None),
        ("train.max_norm=0.0", "max_norm", None),
        ("train.max_norm=2", "max_norm", 2.0),
    ],
)
def test_overrides(tmp_path, override, key, value):
    config = load_config(write(tmp_path, "[train]\nsteps = 7"), [override])
    assert getattr(config.train, key) == value


def test_overrides_make_sections_and_the_last_one_counts(tmp_path):
    path = write(tmp_path, "")
    config = load_config(path, ["model.tied=false", "name=x", "model.width=8", "model.width=16"])
    assert (config.model.tied, config.model.width, config.name) == (False, 16, "x")
    config = load_config(path, ['data.text=["a.txt", "corpus:some"]', "launch.hosts=a:1,b:1"])
    assert config.data.text == (str(tmp_path.resolve() / "a.txt"), "corpus:some")
    assert config.launch.hosts == "a:1,b:1"


def test_paths_of_the_data_are_from_the_folder_of_the_file(tmp_path):
    text = """
        [data]
        tokenizer = "my/tokenizer.json"
        [[data.sources]]
        name = "pairs"
        text = ["a.en", "corpus:some"]
        target = ["a.de", "b.de"]
        weight = 2
    """
    folder = tmp_path.resolve()
    data = load_config(write(tmp_path, text)).data
    assert data.tokenizer == str(folder / "my/tokenizer.json")
    assert data.sources[0].text == (str(folder / "a.en"), "corpus:some")
    assert data.sources[0].target == (str(folder / "a.de"), str(folder / "b.de"))
    assert load_config(write(tmp_path, "data.tokenizer = 'unigram'")).data.tokenizer == "unigram"


def test_workers_do_not_make_another_run(tmp_path):
    config = load_config(write(tmp_path, ""))
    other = load_config(write(tmp_path, "[data]\nworkers = 3"))
    assert config.digest == other.digest and config.trajectory == other.trajectory


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("steps=3", "--set steps: there is no key steps; did you mean train.steps?"),
        ("train.stesp=3", "did you mean train.steps?"),
        ("train=3", "there is no key train"),
        ("train.steps=many", "train.steps = 'many' is not allowed"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, ""), [override])
    assert message in str(caught.value)


def test_paths_are_taken_from_the_config_files_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    path = write(tmp_path / "configs", '[data]\ntext = ["../t/*.txt", "/abs.txt", "corpus:x"]')
    monkeypatch.chdir(tmp_path)
    text = load_config(path.relative_to(tmp_path)).data.text
    assert text == (f"{tmp_path.resolve()}/configs/../t/*.txt", "/abs.txt", "corpus:x")


def test_known_keys_are_the_keys_of_the_resolved_file():
    keys = known_keys()
    assert {"name", "model.width", "loss_scale.hysteresis", "launch.ranks"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_every_key_is_described():
    for name, info in Config.model_fields.items():
        for key, field in getattr(info.annotation, "model_fields", {}).items():
            assert field.description, f"{name}.{key}"


def test_the_digest_ignores_where_and_on_what_a_run_runs():
    base = Config()
    same = make_config(
        {
            "name": "other",
            "launch": {"backend": "tensorflow", "ranks": 4, "threads": 3},
            "output": {"folder": "elsewhere", "log_every": 1},
        },
        "test",
    )
    assert same.digest == base.digest
    for section, key, value in [
        ("train", "seed", 2),
        ("train", "steps", 201),
        ("train", "micro_batch_size", 2),
        ("evaluation", "every", 3),
        ("checkpoint", "every", 3),
        ("model", "dropout", 0.2),
    ]:
        assert make_config({section: {key: value}}, "test").digest != base.digest, key


def test_the_trajectory_leaves_out_what_does_not_change_the_weights():
    base = Config().trajectory
    for section, key, value in [
        ("train", "micro_batch_size", 2),
        ("train", "check_every", 3),
        ("evaluation", "every", 3),
        ("checkpoint", "keep", 3),
        ("launch", "ranks", 3),
        ("schedule", "updates", 200),  # which is what train.steps makes of it
    ]:
        assert make_config({section: {key: value}}, "test").trajectory == base, key
    other = make_config({"train": {"steps": 300}}, "test").trajectory
    assert {key for key in base if base[key] != other[key]} == {"schedule.updates"}


@pytest.mark.parametrize(
    ("name", "key", "reads"),
    [
        ("adamw", "momentum", "learning_rate, beta1, beta2, epsilon, weight_decay"),
        ("adam", "weight_decay", "learning_rate, beta1, beta2, epsilon"),
        ("sgd", "beta2", "learning_rate, momentum, weight_decay"),
        ("adafactor", "epsilon", "learning_rate, weight_decay"),
    ],
)
def test_a_key_that_the_optimizer_does_not_read_is_refused(name, key, reads):
    with pytest.raises(UserError) as caught:
        make_config({"optimizer": {"name": name, key: 0.5}}, "test")
    assert str(caught.value) == (
        f"test: optimizer: {key} = 0.5 means nothing to {name}, which reads {reads}; leave {key} "
        f"out, or choose another name"
    )
    config = make_config({"optimizer": {"name": name}}, "test")
    assert f"optimizer.{key}" not in config.trajectory
    assert load_config_text(to_toml(config)) == config


ENCODER = {"kind": "encoder"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": [{"name": "clm"}]}, "objective.0.name = 'clm' is not allowed; it must be"),
        ({"objective": [{"name": "causal_lm", "foo": 1}]}, "there is no key objective.0.foo"),
        ({"objective": 3}, "objective = 3 is not allowed; it must be a list of sections"),
        (
            {"objective": [{"name": "causal_lm", "density": 0.5}]},
            "density = 0.5 means nothing to causal_lm, which reads smoothing, z_loss; leave",
        ),
        (
            {"objective": [{"name": "masked_lm"}]},
            'objective masked_lm: it needs model.kind = "encoder", not "decoder"',
        ),
        ({"objective": [{"name": "causal_lm"}] * 2}, 'two have a loss "lm"; give one of them'),
        (
            {"objective": [{"name": "causal_lm", "schedule": [[5, 1.0], [5, 0.5]]}]},
            "schedule has steps [5, 5], which must rise",
        ),
        (
            {"objective": [{"name": "causal_lm", "schedule": [[5, 1.0]], "weight": 0.5}]},
            "give weight or schedule, not both",
        ),
        (
            {"model": ENCODER, "objective": [{"name": "masked_lm", "on": "lm"}]},
            'on = "lm" must be the loss of a next_sentence or sentence_order',
        ),
        (
            {
                "model": ENCODER,
                "objective": [{"name": "masked_lm", "masked": 0.9, "randomised": 0.2}],
            },
            "masked = 0.9 and randomised = 0.2 are more than 1 together",
        ),
        (
            {
                "model": {**ENCODER, "task_heads": [{"name": "next_sentence", "outputs": 3}]},
                "objective": [{"name": "next_sentence"}],
            },
            "its head in model.task_heads must have outputs = 2 over sequence",
        ),
        (
            {
                "model": ENCODER,
                "batching": {"kind": "packed"},
                "objective": [{"name": "next_sentence"}],
            },
            "its examples can't share a row",
        ),
        ({"batching": {"tokens": 8}}, 'tokens = 8 means nothing to kind = "windows"'),
        ({"batching": {"kind": "rows"}}, 'it must be "windows" or "packed" or "buckets"'),
        (
            {"model": {"task_heads": [{"name": "x", "outputs": 0}]}},
            "model.task_heads.0.outputs = 0 is not allowed",
        ),
    ],
)
def test_objectives_and_batching_are_checked(values, message):
    with pytest.raises(UserError) as caught:
        make_config(values, "test")
    assert message in str(caught.value)


def test_objectives_give_the_model_its_heads_and_are_read_back(tmp_path):
    config = make_config(
        {
            "model": ENCODER,
            "objective": [
                {"name": "masked_lm", "on": "next_sentence", "schedule": [[0, 1], [9, 0.5]]},
                {"name": "next_sentence", "source": "news", "loss": "next_sentence"},
            ],
        },
        "test",
    )
    (head,) = config.model.task_heads
    assert (head.name, head.outputs, head.over) == ("next_sentence", 2, "sequence")
    assert config.objective[1].source == ("news",)
    assert load_config(write(tmp_path, to_toml(config), "run.toml")) == config
    override = 'objective=[{name = "prefix_lm", z_loss = 1e-4}]'
    (objective,) = load_config(write(tmp_path, ""), [override]).objective
    assert (objective.name, objective.z_loss) == ("prefix_lm", 1e-4)


def test_objectives_and_batching_are_part_of_the_trajectory():
    base = Config().trajectory
    for key, values in [
        ("objective", {"objective": [{"name": "causal_lm", "weight": 2.0}]}),
        ("batching.kind", {"batching": {"kind": "packed"}}),
    ]:
        other = make_config(values, "test").trajectory
        assert {k for k in base if base[k] != other[k]} == {key}


def load_config_text(text):
    return make_config(tomllib.loads(text), "test")


words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
)
overrides = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9._-]{1,80}", fullmatch=True),
        "model": st.fixed_dictionaries(
            {"width": st.sampled_from([8, 24])},
            optional={
                "heads": st.sampled_from([1, 2, 4, 8]),
                "dropout": st.floats(0, 0.999),
                "norm_epsilon": st.floats(1e-30, 0.1),
                "tied": st.booleans(),
                "kind": st.sampled_from(["decoder", "encoder", "encoder-decoder"]),
            },
        ),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "text": st.lists(words, min_size=1, max_size=3),
                "vocabulary": st.integers(300, 2**20),
                "tokenizer": st.sampled_from(["bpe", "wordpiece"]),
                "normalise": st.lists(st.sampled_from(["nfc", "lowercase"]), max_size=2),
                "target": st.lists(words, max_size=2),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "seed": st.integers(0, 2**63 - 1),
                "max_norm": st.none() | st.floats(1e-300, 1e300),
                "micro_batch_size": st.none() | st.integers(1, 2**24),
            },
        ),
        "launch": st.fixed_dictionaries({}, optional={"hosts": st.none() | words}),
    },
)


sources = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True),
            "text": st.lists(words, min_size=1, max_size=2),
        },
        optional={
            "fields": st.lists(words, max_size=2),
            "format": st.sampled_from(["jsonl", "tmx"]),
            "parallel": st.just(False),
            "weight": st.floats(0, 1e9),
        },
    ),
    max_size=3,
    unique_by=lambda source: source["name"],
)


@given(sources=sources)
def test_several_sources_are_read_back_equal(tmp_path_factory, sources):
    folder = tmp_path_factory.getbasetemp()
    config = make_config({"data": {"sources": sources}}, "test", base=Path("/corpora"))
    again = load_config(write(folder, to_toml(config), "sources.toml"))
    assert again == config and again.digest == config.digest


@given(values=overrides)
def test_the_resolved_file_is_read_back_equal(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()
    config = make_config(values, "test", base=Path("/corpora"))
    text = to_toml(config)
    again = load_config(write(folder, text, "round.toml"))
    assert again == config
    assert to_toml(again) == text
    assert again.digest == config.digest
