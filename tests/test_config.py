"""Every setting is checked, and an error names the field, where it stands, and the nearest right name."""

import pytest
import yaml

from equiav.config import (
    SIZES,
    Config,
    ConfigError,
    FinetuneConfig,
    RunConfig,
    differences,
    from_dict,
    load,
    recipe_names,
    to_dict,
    to_yaml,
)


def read(*argv, **kwargs):
    return load(Config, "test", list(argv), **kwargs)[0]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_are_the_papers():
    config = read()
    assert (config.model.width, config.model.depth, config.model.heads) == (768, 12, 12)
    assert (config.objective.temperature, config.objective.centroid_size) == (0.07, 16)
    assert (config.train.warmup_steps, config.train.weight_decay, config.train.clip) == (
        config.train.steps // 10,
        1e-5,
        1.0,
    )
    assert (config.model.head_hidden, config.model.head_width, config.model.aug_width) == (2048, 512, 256)
    a = config.augment
    assert (a.jitter_p, a.blur_p, a.flip_p, a.gray_p, a.mask_p) == (0.8, 0.5, 0.5, 0.2, 0.8)
    assert (a.crop_scale, a.image_crop_ratio, a.audio_crop_ratio) == ((0.08, 1.0), (3 / 4, 4 / 3), (0.8, 1.5))
    assert (a.jitter_factor, a.jitter_hue, a.blur_sigma) == (0.4, 0.1, (0.1, 2.0))
    assert (a.max_mask_frames, a.max_mask_mels) == (192, 48)
    assert (config.train.lr, config.train.lr_start, config.train.betas) == (1e-4, 1e-6, (0.9, 0.95))
    assert (config.data.audio_mean, config.data.audio_std) == (-4.346, 4.332)
    assert config.train.steps == 20 * (1_893_278 // 256)  # 20 epochs of Appendix C's AudioSet-2M


def test_line_over_file_over_size_over_default(yaml_file):
    path = yaml_file("model:\n  size: tiny\n  depth: 5\ntrain:\n  lr: 1e-3\n  steps: 20\n  warmup_steps: 3\n")
    config = read("--config", path, "--train.lr", "2e-3")
    assert (config.model.width, config.model.depth, config.train.lr, config.train.steps) == (64, 5, 2e-3, 20)
    assert config.augment.max_mask_frames == 48  # the size's
    assert read(f"--config={path}", "--model.size=vit_s16").model.width == 384
    assert read(f"--config={path}", "--model.size", "vit_s16").model.depth == 5
    assert read("--augment.crop_scale", "0.3", "0.9").augment.crop_scale == (0.3, 0.9)
    assert read("--objective.no-intra_positive_in_denominator").objective.intra_positive_in_denominator is False


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_valid(size):
    assert read("--model.size", size).model.size == size


def test_every_recipe_is_valid_and_introduces_itself():
    from importlib import resources

    assert recipe_names(RunConfig) == ["audioset2m", "smoke"]
    assert len(recipe_names(FinetuneConfig)) == 9
    for name in recipe_names():
        cls = RunConfig if name in recipe_names(RunConfig) else FinetuneConfig
        assert load(cls, "test", ["--config", name])[0]
        assert (resources.files("equiav.config.recipes") / f"{name}.yaml").read_text().startswith("# ")


def test_printed_config_reads_back_to_itself(yaml_file):
    config, shown = load(Config, "test", ["--config", "smoke", "--train.lr", "3e-4", "--print-config"])
    assert shown
    text = to_yaml(config)
    assert read("--config", yaml_file(text)) == config
    assert yaml.safe_load(text) == to_dict(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  widht: 3\n", "unknown field model.widht; did you mean model.width"),
        ("trian:\n  lr: 1\n", "unknown field trian; did you mean train"),
        ("zzz: 1\n", "unknown field zzz; the fields are model, augment"),
        ("model:\n  depth: deep\n", "model.depth: found 'deep', expected an integer"),
        ("train:\n  steps: 1.5\n", "train.steps: found 1.5, expected an integer"),
        ("train:\n  lr: fast\n", "train.lr: found 'fast', expected a finite number"),
        ("train:\n  lr: .nan\n", "train.lr: found nan, expected a finite number"),
        ("seed: true\n", "seed: found True, expected an integer"),
        ("model:\n  predictor: magic\n", "model.predictor: found 'magic', expected one of attention, linear, hypernet"),
        ("model:\n  size: huge\n", "model.size is 'huge', expected one of tiny, vit_s16"),
        ("model: 3\n", r"model: found 3, expected its settings \(`field: value`\)"),
        ("augment: []\n", r"augment: found \[\], expected its settings"),
        ("- 1\n", "expected settings .* found list"),
        ("a: [\n", "line 2: not valid YAML: expected the node content"),
        ("train:\n  steps: 5\ntrain:\n  lr: 1\n", "line 3: not valid YAML: train stands there twice"),
        ("train:\n  lr: 1\n  lr: 2\n", "line 3: not valid YAML: lr stands there twice"),
        ("1: 2\n", "line 1: not valid YAML: a name is '1', expected text"),
        ("? [a, b]\n: 3\n", "line 1: not valid YAML: a name is a list, expected text"),
        ("seed: 1999-13-45\n", "not valid YAML: month must be in 1..12"),
        ('seed: !!int "x"\n', "not valid YAML: invalid literal for int"),
        ("model: {size: [1]}\n", r"model.size is \[1\], expected one of tiny"),
        ("a: \0", "not valid YAML: unacceptable character"),
        ("train:\n  betas: [0.9]\n", r"train.betas: found \[0.9\], expected 2 values, each a finite number"),
        ("train:\n  betas: [0.9, x]\n", r"train.betas: found \[0.9, 'x'\], expected 2 values"),
        ("model:\n  depth: {a: 1}\n", "model.depth: found {'a': 1}, expected an integer"),
        ("model:\n  width: 63\n", "model.width is 63, expected a multiple of model.heads"),
        ("train:\n  clip: -1\n", "train.clip is -1.0, expected a positive number"),
    ],
)
def test_mistakes_in_a_file_are_named(yaml_file, text, message):
    path = yaml_file(text)
    with pytest.raises(ConfigError, match=message) as error:
        read("--config", path)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.widht", "3"], "there is no --model.widht; did you mean --model.width?"),
        (["--zzz", "3"], "there is no --zzz; --help lists what there is"),
        (["--train.steps", "many"], "--train.steps: found 'many', expected an integer"),
        (["--train.steps", "1.5"], "--train.steps: found '1.5', expected an integer"),
        (["--train.lr", "nan"], "--train.lr: found nan, expected a finite number"),
        (["--train.lr"], "--train.lr: expected a value"),
        (["--train.lr", "--seed", "3"], "--train.lr: expected a value"),
        (["--train.betas", "0.9"], "--train.betas 0.9: expected 2 values"),
        (["--train.betas", "0.9", "x"], "--train.betas: found [0.9, 'x'], expected 2 values, each a finite number"),
        (
            ["--train.betas", "0.9", "0.95", "0.99"],
            "'0.99' is not expected; settings are given as --section.field value",
        ),
        (["--no-seed", "3"], "there is no --no_seed; did you mean --seed?"),
        (["stray"], "'stray' is not expected; settings are given as --section.field value"),
        (["--train.compile=maybe"], "--train.compile: found 'maybe', expected true or false"),
        (
            ["--model.predictor", "magic"],
            "--model.predictor: found 'magic', expected one of attention, linear, hypernet",
        ),
        (["--model.width", "63"], "model.width is 63, expected a multiple of model.heads=12"),
        (["--model.size", "vit_h"], "model.size is 'vit_h', expected one of tiny, vit_s16, vit_b16, vit_l16"),
        (["--seed", "-1"], "seed is -1, expected 0 to 2^63 - 1"),
    ],
)
def test_mistakes_on_the_line_are_named(argv, message):
    with pytest.raises(ConfigError) as error:
        read(*argv)
    assert str(error.value) == message


def test_what_file_and_line_say_together_is_checked(yaml_file):
    """Neither is wrong before the other is known."""
    path = yaml_file("train:\n  steps: 10\n")
    with pytest.raises(ConfigError, match=r"^train\.warmup_steps is 14790, expected 0 to train\.steps=10$"):
        read("--config", path)
    assert read("--config", path, "--train.warmup_steps", "5").train.steps == 10
    assert read("--train.warmup_steps=5", "--config", path, "--train.steps", "20").train.steps == 20
    assert read("--config", path, "--train.steps", "20000").train.warmup_steps == 14790


def test_parts_of_a_file_may_refer_to_others(yaml_file):
    text = "model: &m {size: tiny}\ntrain:\n  <<: {steps: 30, warmup_steps: 3}\n  steps: 40\n"
    assert read("--config", yaml_file(text)).train.steps == 40


def test_forms_of_the_line():
    assert read("--train.compile").train.compile is True
    assert read("--train.compile=true").train.compile is True
    assert read("--train.no-compile").train.compile is False
    assert read("--train.lr-start", "1e-7").train.lr_start == 1e-7
    assert read("--data.audio_mean", "-9.5").data.audio_mean == -9.5
    assert read("--data.audio_mean=-9.5").data.audio_mean == -9.5
    assert read("--seed", "3", "--seed", "4").seed == 4


def test_missing_config_names_the_recipes():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file, and the recipes are audioset2m, smoke"):
        read("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "depth", 0),
        ("model", "predictor_heads", 0),
        ("model", "predictor_width", -8),
        ("model", "width", 66),
        ("augment", "blur_p", -0.1),
        ("augment", "blur_sigma", [0.0, 2.0]),
        ("train", "lr_start", 0.0),
        ("train", "clip", 0.0),
        ("train", "warmup_steps", -1),
        ("model", "image_size", 65),
        ("model", "spectrogram_mels", 60),
        ("model", "predictor_width", 63),
        ("augment", "blur_p", 1.5),
        ("augment", "crop_scale", [0.5, 1.5]),
        ("augment", "crop_scale", [0.5, 0.1]),
        ("augment", "jitter_factor", 1.0),
        ("augment", "jitter_hue", 0.6),
        ("augment", "max_mask_frames", 256),
        ("augment", "max_mask_mels", 64),
        ("augment", "max_mask_mels", -1),
        ("objective", "centroid_size", 0),
        ("objective", "temperature", 0.0),
        ("objective", "two_stage_split", 1.0),
        ("objective", "weight_inter", -1.0),
        ("data", "sample_rate", 0),
        ("data", "audio_std", 0.0),
        ("data", "min_seconds", 0.01),
        ("data", "silence", 1.0),
        ("train", "batch_size", 1),
        ("train", "steps", 0),
        ("train", "warmup_steps", 10**9),
        ("train", "lr_start", 1.0),
        ("train", "weight_decay", -1.0),
        ("train", "betas", [0.9, 1.0]),
    ],
)
def test_values_out_of_range_are_named(section, field, value):
    values = {"model": {"size": "tiny"}}
    values.setdefault(section, {})[field] = value
    with pytest.raises(ConfigError, match=rf"{section}\.{field} is .*, expected"):
        from_dict(Config, values, "test")


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_named(seed):
    with pytest.raises(ConfigError, match="seed is"):
        from_dict(Config, {"seed": seed}, "test")


def test_an_empty_section_is_its_defaults(yaml_file):
    assert read("--config", yaml_file("model:\ntrain:\n  steps: 20000\n")).model == read().model


def test_a_run_without_any_loss_is_refused():
    with pytest.raises(ConfigError, match="objective is without any loss"):
        from_dict(Config, {"objective": {"intra": "none", "weight_inter": 0.0}}, "test")
    weights = {"weight_inter": 0.0, "weight_intra_audio": 0.0, "weight_intra_image": 0.0}
    with pytest.raises(ConfigError, match="objective is without any loss"):
        from_dict(Config, {"objective": weights}, "test")
    for one_loss in ({"intra": "none"}, {"weight_inter": 0.0}):
        with pytest.raises(ConfigError, match=r"objective\.schedule is two_stage, expected joint"):
            from_dict(Config, {"objective": {**one_loss, "schedule": "two_stage"}}, "test")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("field", ["data.audio_mean", "data.audio_std", "objective.temperature", "train.lr"])
def test_values_that_are_not_finite_are_refused_on_the_line_too(capsys, field, value):
    with pytest.raises((SystemExit, ConfigError)):
        read(f"--{field}", value)


def test_a_run_that_began_before_a_setting_existed_had_its_default():
    config = from_dict(RunConfig, {"model": {"size": "tiny"}, "train": {"lr": 1e-3}}, "test")
    began = to_dict(config)
    began["init"] = began.pop("weights") + "runs/one"  # as it was called
    del began["train"]["clip"], began["stream"]["max_bad"], began["augment"]["gray_p"], began["objective"]
    assert differences(config, began) == ([], [])
    changed = from_dict(RunConfig, {"model": {"size": "tiny"}, "train": {"lr": 1e-3, "clip": 2.0}}, "test")
    assert differences(changed, began) == (["train.clip is 2.0, was 1.0"], [])


def test_what_a_run_may_change_on_its_way():
    config = from_dict(RunConfig, {"model": {"size": "tiny"}}, "test")
    other = {
        "model": {"size": "tiny"},
        "stream": {"workers": 1, "max_bad": 0.5, "url": "x"},
        "train": {"micro_batch": 4, "shard": 2},
        "checkpoint": {"keep": 1},
        "out": "elsewhere",
    }
    refused, otherwise = differences(from_dict(RunConfig, other, "test"), to_dict(config))
    assert (refused, otherwise) == ([], ["train.micro_batch is 4, was 32"])
    refused, _ = differences(from_dict(RunConfig, {"model": {"size": "tiny"}, "seed": 3}, "test"), to_dict(config))
    assert refused == ["seed is 3, was 0"]
