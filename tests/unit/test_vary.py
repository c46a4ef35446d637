"""The grid of a comparison: keys by short names, values of every type, and what is refused."""

from functools import partial

import pytest

from horovod_lm.compare import _of_other_data, check_unused
from horovod_lm.config import load_config, make_config
from horovod_lm.errors import UserError
from horovod_lm.variants import display_names, make_variants, parse_vary


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nwidth = 64\n")
    return partial(load_config, path)


def labels(variants):
    return [variant.label for variant in variants]


def names(variants):
    return display_names([variant.config for variant in variants])


def test_both_backends_are_compared_by_default(load):
    variants = make_variants((), load)
    assert labels(variants) == ["torch", "tensorflow"]
    assert names(variants) == ["PyTorch", "TensorFlow"]
    assert [variant.config.launch.backend for variant in variants] == ["torch", "tensorflow"]


@pytest.mark.parametrize(
    ("vary", "label", "name"),
    [
        ("ranks=1,2", ["ranks-1", "ranks-2"], ["1 rank", "2 ranks"]),
        ("precision=fp32,bf16", ["fp32", "bf16"], ["fp32", "bf16"]),
        ("controller=mpi,gloo", ["mpi", "gloo"], ["MPI", "Gloo"]),
        ("launcher=mpirun,horovodrun", ["mpirun", "horovodrun"], ["mpirun", "horovodrun"]),
        (
            "model.norm_placement=pre,post",
            ["norm-placement-pre", "norm-placement-post"],
            ["norm_placement=pre", "norm_placement=post"],
        ),
        ("optimizer.name=sgd,lamb", ["optimizer-sgd", "optimizer-lamb"],
         ["optimizer=sgd", "optimizer=lamb"]),
        ("learning_rate=1e-3, 2e-3", ["learning-rate-0.001", "learning-rate-0.002"],
         ["learning_rate=0.001", "learning_rate=0.002"]),
        ("tied=true,false", ["tied-true", "tied-false"], ["tied=true", "tied=false"]),
        ("max_norm=0,1.0", ["max-norm-0", "max-norm-1.0"], ["max_norm=null", "max_norm=1.0"]),
        ("vocabulary=300,400", ["vocabulary-300", "vocabulary-400"],
         ["vocabulary=300", "vocabulary=400"]),
    ],
)  # fmt: skip
def test_values_of_any_type_have_a_folder_and_a_name(load, vary, label, name):
    variants = make_variants([vary], load)
    assert labels(variants) == label and names(variants) == name


def test_lists_are_values_too(load):
    variants = make_variants(['text=["a.txt"],["/b/c.txt", "d.txt"]'], load)
    assert labels(variants) == ["text-a.txt", "text-b-c.txt-d.txt"]
    assert [len(variant.config.data.text) for variant in variants] == [1, 2]


def test_several_keys_make_a_grid(load):
    variants = make_variants(["precision=fp32,bf16", "backend=torch,tensorflow"], load)
    assert labels(variants) == ["fp32-torch", "fp32-tensorflow", "bf16-torch", "bf16-tensorflow"]
    assert names(variants)[3] == "TensorFlow bf16"
    assert variants[1].overrides == {"train.precision": "fp32", "launch.backend": "tensorflow"}


def test_what_is_varied_wins_over_what_is_set(load):
    variants = make_variants(["ranks=1,2"], lambda values: load(["launch.ranks=8", *values]))
    assert [variant.config.launch.ranks for variant in variants] == [1, 2]


def test_labels_that_would_be_alike_are_not(load):
    variants = make_variants(['text=["a b"],["a-b"],["a/b"]'], load)
    assert labels(variants) == ["text-a-b", "text-a-b-2", "text-a-b-3"]


@pytest.mark.parametrize("text", ['text=["../../etc"],["."]', 'text=["a\\u0000b"],["\\n/../x"]'])
def test_no_value_leads_out_of_the_folder(load, text):
    for label in labels(make_variants([text], load)):
        assert label and "/" not in label and not label.startswith((".", "-"))
        assert all(c.isalnum() or c in ".-" for c in label)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["precison=fp32,bf16"], "there is no key precison; did you mean train.precision?"),
        (["every=1,2"], "could be evaluation.every or checkpoint.every; say which"),
        (["precision=fp32"], "is one value; give at least two, as in precision=A,B"),
        (["ranks=2,2"], "has the same value twice"),
        (["ranks"], "not of the form KEY=A,B"),
        (["=1,2"], "not of the form KEY=A,B"),
        (["ranks=1,2", "launch.ranks=2,4"], "launch.ranks is given twice"),
        (["name=a,b"], "changes nothing that could be compared"),
        (["output.folder=a,b"], "changes nothing that could be compared"),
        (["precision=fp32,fp8"], "train.precision = 'fp8' is not allowed"),
        (["model.heads=8,7"], "width = 64"),
        (["steps=1,2,3,4,5", "ranks=1,2,3,4"], "makes 20 variants"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(load, vary, message):
    with pytest.raises(UserError) as caught:
        make_variants(vary, load)
    assert message in str(caught.value)


def test_one_seed_alone_can_be_varied(load):
    assert labels(make_variants(["seed=1,2"], load)) == ["seed-1", "seed-2"]
    with pytest.raises(UserError, match="both change the seed"):
        make_variants(["seed=1,2"], load, several_seeds=True)


def test_a_short_key_is_the_last_part_of_one_key():
    assert parse_vary("norm_placement=pre,post") == ("model.norm_placement", ["pre", "post"])
    assert parse_vary("train.seed = 1, 2") == ("train.seed", [1, 2])


def test_data_is_checked_for_every_way_in_which_it_fills_rows():
    """Text that is too short for a window may be long enough for documents."""
    kinds = ("packed", "windows", "windows")
    configs = [make_config({"batching": {"kind": kind}}, "test") for kind in kinds]
    assert [c.batching.kind for c in _of_other_data(configs)] == ["packed", "windows"]


@pytest.mark.parametrize(
    ("report", "used"),
    [
        (None, False),
        ('{"state": "failed"}', False),
        ('{"state": "stopped"}', False),
        ('{"state": "running"}', True),
        ('{"state": "fin', True),
        ('{"tests": 3}', True),
        ("[1, 2]", True),
        ("\x80", True),
    ],
)
def test_a_folder_with_a_report_is_in_use(report, used, tmp_path):
    if report is not None:
        (tmp_path / "report.json").write_text(report, encoding="latin-1")
    if not used:
        check_unused(tmp_path, [], 1)
        return
    with pytest.raises(UserError, match="is in use: there is a run or a report in it; give"):
        check_unused(tmp_path, [], 1)
