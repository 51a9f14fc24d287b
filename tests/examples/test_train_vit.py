"""The pieces of `examples/train_vit.py`: which data, which model, what becomes of an image, what a person reads."""

import dataclasses
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PilImage
from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor


def plain(colour, size=(12, 10)):
    return PilImage.new("RGB", size, colour)


def labelled(labels, names=("cat", "dog"), image="image", label="label"):
    return Dataset.from_dict(
        {image: [plain((10 * index % 256, 0, 0)) for index in range(len(labels))], label: labels},
        features=Features({image: Image(), label: ClassLabel(names=list(names))}),
    )


@pytest.fixture
def hub(monkeypatch):
    """Puts splits where a data set of the Hub would come from."""

    def publish(**splits):
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: DatasetDict(splits))

    return publish


@pytest.fixture
def image_folder(tmp_path):
    """`image_folder(train=..., test=...)`: a folder with splits, classes and images, each image of one colour."""

    def write(**splits):
        for split, classes in splits.items():
            for name, number in classes.items():
                folder = tmp_path / "photos" / split / name
                folder.mkdir(parents=True)
                for index in range(number):
                    plain((index, 0, 0)).save(folder / f"{index}.png")
        return tmp_path / "photos"

    return write


# The data


def test_the_default_is_the_digits_split_in_the_same_way_each_time(train_vit):
    data, again = (train_vit.load_data(train_vit.DataArguments()) for _ in range(2))
    assert (len(data.train), len(data.eval)) == (1437, 360)
    assert isinstance(data.train.features["image"], Image)
    assert data.label_names == [str(digit) for digit in range(10)]
    assert data.train[0]["image"].size == (8, 8)
    assert data.eval["label"][:] == again.eval["label"][:]
    assert data.train["label"][:] == again.train["label"][:]
    counts = np.bincount(data.eval["label"][:])
    assert counts.min() >= 35 and counts.max() <= 37


def test_digits_are_those_of_scikit_learn(train_vit):
    from image_data import load_digits as as_dataset
    from sklearn.datasets import load_digits

    arrays, digits = load_digits(), as_dataset()
    assert digits["label"][:] == arrays.target.tolist()
    grey = np.stack([np.asarray(image) for image in digits["image"][:]])
    np.testing.assert_array_equal(np.round(grey * (16 / 255)), arrays.images)


def test_columns_are_found_by_their_type(train_vit, hub):
    hub(
        train=labelled([0, 1] * 10, image="picture", label="species"),
        test=labelled([0, 1], image="picture", label="species"),
    )
    data = train_vit.load_data(train_vit.DataArguments(dataset_name="someone/animals"))
    assert (data.image_column, data.label_column) == ("picture", "species")
    assert (len(data.train), len(data.eval)) == (20, 2)


def test_of_two_label_columns_the_user_names_one(train_vit, hub):
    two = labelled([0, 1] * 10)
    hub(train=two.add_column("fine", [0, 1] * 10).cast_column("fine", ClassLabel(names=["a", "b"])))
    with pytest.raises(ValueError, match=r"2 columns \(label, fine\).*--label_column"):
        train_vit.load_data(train_vit.DataArguments(dataset_name="x"))
    assert train_vit.load_data(train_vit.DataArguments(dataset_name="x", label_column="fine")).label_names == [
        "a",
        "b",
    ]


def test_labels_that_are_words_or_numbers_are_numbered_alike_in_both_splits(train_vit, hub):
    def split(words):
        return Dataset.from_dict(
            {"image": [plain("red")] * len(words), "word": words},
            features=Features({"image": Image(), "word": Value("string")}),
        )

    hub(train=split(["owl", "fox", "owl"]), validation=split(["owl"]))
    data = train_vit.load_data(train_vit.DataArguments(dataset_name="x", label_column="word"))
    assert data.label_names == ["fox", "owl"]
    assert (data.train["word"][:], data.eval["word"][:]) == ([1, 0, 1], [1])
    hub(train=split(["owl", "fox", "owl"]), validation=split(["bat"]))
    with pytest.raises(ValueError, match="labels that the training split lacks"):
        train_vit.load_data(train_vit.DataArguments(dataset_name="x", label_column="word"))


def test_an_unlabelled_test_split_is_passed_over_but_not_when_it_is_asked_for(train_vit, hub):
    hub(train=labelled([0, 1] * 10), test=labelled([-1, -1]))
    assert len(train_vit.load_data(train_vit.DataArguments(dataset_name="x")).eval) == 4
    with pytest.raises(ValueError, match="2 of the 2 samples of the split 'test' have no label"):
        train_vit.load_data(train_vit.DataArguments(dataset_name="x", eval_split="test"))


def test_an_image_folder_brings_its_classes_and_splits(train_vit, image_folder):
    folder = image_folder(train={"ant": 10, "bee": 10}, test={"ant": 2, "bee": 3})
    data = train_vit.load_data(train_vit.DataArguments(data_dir=str(folder)))
    assert data.label_names == ["ant", "bee"]
    assert (len(data.train), len(data.eval)) == (20, 5)


def test_an_image_folder_without_splits_is_split(train_vit, image_folder):
    folder = image_folder(**{".": {"ant": 10, "bee": 10}})
    data = train_vit.load_data(train_vit.DataArguments(data_dir=str(folder)))
    assert (len(data.train), len(data.eval)) == (16, 4)
    assert sorted(data.eval["label"][:]) == [0, 0, 1, 1]


def test_fewer_samples_are_a_mixture_of_classes(train_vit, hub):
    hub(train=labelled([0] * 50 + [1] * 50), test=labelled([0] * 50 + [1] * 50))
    data = train_vit.load_data(train_vit.DataArguments(dataset_name="x", max_train_samples=20, max_eval_samples=10))
    assert (len(data.train), len(data.eval)) == (20, 10)
    assert set(data.train["label"][:]) == set(data.eval["label"][:]) == {0, 1}


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({"train": labelled([])}, {}, "The split 'train' is empty"),
        ({"train": labelled([0, -1])}, {}, "1 of the 2 samples of the split 'train' have no label"),
        (
            {"train": labelled([0, 1]).remove_columns("label")},
            {},
            r"No column has the type ClassLabel.*image \(Image\)",
        ),
        ({"train": labelled([0, 1]).remove_columns("image")}, {}, "No column has the type Image"),
        ({"train": labelled([0, 0, 0], names=["cat"])}, {}, "only one class"),
        ({"train": labelled([0])}, {}, "too small to hold out"),
        ({"test": labelled([0, 1])}, {}, "--train_split train: there is no such split. There are: test"),
        ({"train": labelled([0, 1])}, {"eval_split": "dev"}, "--eval_split dev"),
        ({"train": labelled([0, 1]), "dev": labelled([])}, {"eval_split": "dev"}, "The split 'dev' is empty"),
        ({"train": labelled([0, 1])}, {"label_column": "kind"}, "--label_column|There are: image"),
        ({"train": labelled([0, 1])}, {"image_column": "label"}, "expected images, found ClassLabel"),
        ({"train": labelled([0, 1])}, {"label_column": "image"}, "expected one label for each image, found Image"),
        (
            {"train": labelled([0, 1]), "test": labelled([0], names=["dog", "cat"])},
            {},
            "name their classes differently",
        ),
    ],
)
def test_data_to_learn_nothing_from_is_refused_in_a_sentence(train_vit, hub, splits, options, message):
    hub(**splits)
    with pytest.raises(ValueError, match=message) as caught:
        train_vit.load_data(train_vit.DataArguments(dataset_name="someone/something", **options))
    assert "\n" not in str(caught.value)


def test_folders_without_images_or_labels_are_refused(train_vit, tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        train_vit.load_data(train_vit.DataArguments(data_dir=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Could not load"):
        train_vit.load_data(train_vit.DataArguments(data_dir=str(tmp_path / "empty")))
    (tmp_path / "flat").mkdir()
    plain("red").save(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="lie in no class's folder"):
        train_vit.load_data(train_vit.DataArguments(data_dir=str(tmp_path / "flat")))


# The model


@pytest.fixture
def animals(train_vit, hub):
    hub(train=labelled([0, 1, 2] * 10, names=("ant", "bee", "cat")))
    return train_vit.load_data(train_vit.DataArguments(dataset_name="x"))


@pytest.fixture
def saved_convnext(tmp_path):
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 8], depths=[1, 1], num_labels=5, image_size=48)
    ConvNextForImageClassification(config).save_pretrained(tmp_path / "pretrained")
    # Its size is the shortest edge, and what remains is cropped.
    ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.9).save_pretrained(tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


def logits_for(recipe, view, data):
    model = recipe.model_init().eval()
    with torch.no_grad():
        return model(pixel_values=view.pixels(data.eval[:2]["image"])).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 32},
        {"timm_architecture": "test_resnet", "image_size": 64},
        {"timm_architecture": "test_vit"},
    ],
    ids=str,
)
def test_models_from_scratch_fit_the_labels_and_the_images(train_vit, animals, options):
    recipe = train_vit.choose_recipe(train_vit.ModelArguments(**options), animals)
    for view in (
        train_vit.EvaluationView(recipe.processor, "image", "label"),
        train_vit.TrainingView(recipe.processor, "image", "label", "crop"),
    ):
        assert logits_for(recipe, view, animals).shape == (2, 3)
    assert recipe.model_init().config.id2label == {0: "ant", 1: "bee", 2: "cat"}


def test_glyphs_are_seen_whole_and_as_large_as_they_are(train_vit, animals):
    glyphs = dataclasses.replace(animals, name="glyphs-short")
    image = PilImage.new("RGB", (32, 32))
    image.putpixel((0, 0), (255, 255, 255))
    for options in ({}, {"timm_architecture": "test_resnet"}):
        recipe = train_vit.choose_recipe(train_vit.ModelArguments(**options), glyphs)
        pixels = train_vit.EvaluationView(recipe.processor, "image", "label").pixels([image])
        assert pixels.shape == (1, 3, 32, 32)
        assert (pixels[0, 0] > pixels[0, 0, 5, 5]).nonzero().tolist() == [[0, 0]]


def test_a_pretrained_model_gets_a_head_for_the_labels_and_keeps_the_rest(train_vit, animals, saved_convnext):
    recipe = train_vit.choose_recipe(train_vit.ModelArguments(model_name_or_path=saved_convnext), animals)
    model = recipe.model_init()
    before = ConvNextForImageClassification.from_pretrained(saved_convnext).state_dict()
    assert model.classifier.weight.shape[0] == 3
    assert model.config.label2id == {"ant": 0, "bee": 1, "cat": 2}
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier"):
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_timm_model_starts_from_timms_own_initialization(train_vit, animals):
    import timm

    recipe = train_vit.choose_recipe(train_vit.ModelArguments(timm_architecture="test_resnet"), animals)
    torch.manual_seed(0)
    ours = recipe.model_init().timm_model.state_dict()["conv1.0.weight"]
    timms = timm.create_model("test_resnet", num_classes=3).state_dict()["conv1.0.weight"]
    assert ours.std().item() == pytest.approx(timms.std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timm_architecture": "resnet1"}, "no such model. Did you mean"),
        ({"timm_architecture": "vit_tiny_patch16_224", "image_size": 8}, "does not work with images of 8×8"),
        ({"image_size": 44}, "multiple of the patches' 5 pixels"),
        ({"model_name_or_path": "no/such-model"}, "Could not load an image classifier from 'no/such-model'"),
    ],
)
def test_models_that_cannot_be_built_are_refused_in_a_sentence(train_vit, animals, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_vit.choose_recipe(train_vit.ModelArguments(**options), animals)
    assert "\n" not in str(caught.value)


# The images


@pytest.mark.parametrize("kind", ["vit", "timm", "convnext"])
def test_training_and_evaluation_see_the_same_size_and_colours(train_vit, animals, saved_convnext, kind):
    options = {
        "vit": {},
        "timm": {"timm_architecture": "test_resnet"},
        "convnext": {"model_name_or_path": saved_convnext},
    }[kind]
    recipe = train_vit.choose_recipe(train_vit.ModelArguments(**options), animals)
    evaluation = train_vit.EvaluationView(recipe.processor, "image", "label")
    training = train_vit.TrainingView(recipe.processor, "image", "label", "none")
    images = [plain(colour, (40, 40)) for colour in ("white", "orange", (1, 100, 200))]
    torch.testing.assert_close(training.pixels(images), evaluation.pixels(images), rtol=0, atol=1e-5)


def test_augmentation_draws_from_torchs_generator_and_evaluation_draws_nothing(train_vit):
    data = train_vit.load_data(train_vit.DataArguments(max_train_samples=4))
    recipe = train_vit.choose_recipe(train_vit.ModelArguments(), data)
    for augmentation in ("shift", "crop"):
        view = train_vit.TrainingView(recipe.processor, "image", "label", augmentation)
        torch.manual_seed(0)
        first = view(data.train[:4])["pixel_values"]
        second = view(data.train[:4])["pixel_values"]
        torch.manual_seed(0)
        assert torch.equal(view(data.train[:4])["pixel_values"], first)
        assert not torch.equal(first, second)
    state = torch.get_rng_state()
    evaluation = train_vit.EvaluationView(recipe.processor, "image", "label")
    assert torch.equal(evaluation(data.eval[:4])["pixel_values"], evaluation(data.eval[:4])["pixel_values"])
    assert torch.equal(torch.get_rng_state(), state)


# The command line


def test_a_flag_wins_over_the_examples_defaults_and_the_rest_keeps_them(train_vit):
    _, _, config = train_vit.parse(["--learning_rate", "0.5", "--use_cpu"])
    assert config.learning_rate == 0.5
    assert config.shuffle_stop == 0.75
    assert config.num_train_epochs == 20


def test_probability_fits_the_length_of_the_run_unless_it_is_given(train_vit):
    _, _, config = train_vit.parse(["--use_cpu"])
    assert config.probability_for(460) == 140 / 460  # of the default job: README's table
    _, _, config = train_vit.parse(["--use_cpu", "--shuffle_probability", "0.01"])
    assert config.probability_for(460) == 0.01


def test_help_lists_every_option_with_its_group(train_vit_script):
    shown = subprocess.run(
        [sys.executable, train_vit_script, "--help"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for expected in ("--shuffle_schedule", "{wash,", "--timm_architecture", "--learning_rate", "--data_dir"):
        assert expected in shown
    assert shown.startswith("usage: train_vit.py [--flag value ...]")
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [title.split()[0].strip(":,") for title in titles] == [
        *("options", "data", "model", "population", "training", "saving", "all")
    ]
    population, rest = shown.split("\npopulation ")[1].split("\ntraining, ")
    training, saving = rest.split("\nall else ")[0].split("\nsaving, ")
    assert "--population_size" in population and "--learning_rate" not in population
    assert training.index("--num_train_epochs") < training.index("--learning_rate") and "--adam_beta1" not in training
    assert "--output_dir" in saving and "--report " in saving and "--hub_model_id" in saving
    assert "--no_same_init        Turns --same_init off: each member starts" in population


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_dir", "a", "--dataset_name", "b"], "both name training data"),
        (["--model_name_or_path", "a", "--timm_architecture", "b"], "both name a model"),
        (["--dataset_name", "someone/animals"], "Could not load 'someone/animals'"),
        (["--shuffle_probability", "1.5"], "shuffle_probability"),
        (["--remove_unused_columns", "--use_cpu"], "leave it off"),
        (["--max_train_samples", "0"], "must be at least 1, found 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_a_failed_exit(train_vit, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["train_vit.py", *flags])
    with pytest.raises(SystemExit) as ended:
        train_vit.main()
    line = ended.value.code
    assert line.startswith("train_vit.py: error: ") and message in line and "\n" not in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--populatoin_size", "3"], "there is no flag --populatoin_size; the closest is --population_size."),
        # Named before what else is wrong because of it.
        (["--augmentatoin=x", "--data_dir", "a", "--dataset_name", "b"], "the closest is --augmentation."),
        (["--xyz"], "there is no flag --xyz; `--help` lists the flags."),
        (["photos/"], "'photos/' belongs to no flag; `--help` lists the flags."),
    ],
)
def test_a_flag_that_there_is_not_is_named_in_one_line_with_the_closest(
    train_vit, monkeypatch, capsys, flags, message
):
    monkeypatch.setattr(sys, "argv", ["train_vit.py", *flags])
    with pytest.raises(SystemExit) as ended:
        train_vit.main()
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(told) == 1 and told[0].endswith(message) and ": error: " in told[0]


def test_the_table_has_a_row_for_each_model(train_vit):
    metrics = {
        f"eval_{who}{metric}": value
        for who in ("", "ensemble_", "member_0_", "member_1_")
        for metric, value in {"accuracy": 0.5, "loss": 1.25, "ece": 0.125}.items()
    }
    metrics |= {"eval_members_accuracy_mean": 0.5, "eval_members_loss_mean": 1.25, "eval_members_ece_mean": 0.125}
    rows = train_vit.results_table(metrics).splitlines()
    assert [row[:14].strip() for row in rows] == ["", "member 0", "member 1", "members' mean", "ensemble", "soup"]
    assert rows[-1].split() == ["soup", "50.00%", "1.2500", "0.1250"]
    soup_only = {"eval_accuracy": 1.0, "eval_loss": 0.0, "eval_ece": 0.0}
    assert len(train_vit.results_table(soup_only).splitlines()) == 2
