"""figures.py: each function gives a Figure with the axes and words it promises, also for odd inputs."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import figures
from errors import UserError

CLASSES = tuple("0123456789")
LONG = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot")
DOLLARS = ("$_$", "$x_1$", "US$", r"a\$b$", "$", "$$", "$\\frac$", "_$^$_", "${}$", "x")


def guesses(labels: np.ndarray, wrong: int) -> np.ndarray:
    """Probabilities (N, 10) that are right but for the first `wrong` images, ever less sure of themselves."""
    probabilities = np.full((len(labels), 10), 0.01)
    for index, label in enumerate(labels):
        guess = (label + 1) % 10 if index < wrong else label
        probabilities[index, guess] = 0.9 - 0.3 * index / len(labels)
        probabilities[index, (label + 5) % 10] = 0.05
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def words(figure: Figure) -> str:
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    return "\n".join(text.get_text() for text in texts)


def curves() -> dict[str, dict]:
    return {name: {"unit": "pixels", "strengths": [0, 1, 2], "accuracy": [0.9, 0.5, 0.1], "images": 7}
            for name in ("rotation", "noise", "blur", "shift")}


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    return rng.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8), labels


@pytest.mark.parametrize(("classes", "wrong"), [(CLASSES, 7), (DOLLARS, 40), (LONG, 0)])
def test_every_figure_can_be_saved(examples, classes, wrong, tmp_path):
    images, labels = examples
    probabilities = guesses(labels, wrong)
    predicted = probabilities.argmax(axis=1)
    table = [("", classes[:2]), ("accuracy", "12")]
    drawn = {
        "confusion": figures.confusion(labels, predicted, classes),
        "predictions": figures.predictions(images, labels, probabilities, classes),
        "mistakes": figures.mistakes(images, labels, probabilities, classes),
        "class_scores": figures.class_scores(labels, predicted, classes),
        "hardest": figures.hardest(images, labels, probabilities, classes),
        "reliability": figures.reliability(labels, probabilities),
        "robustness": figures.robustness(curves()),
        "bars": figures.bars(images[0], probabilities[0], classes, "a $title$"),
        "comparison": figures.comparison(table, labels, [predicted] * 2, classes, "here"),
        "performance": figures.performance([("parameters", "1")], {"mamba": {1: 2.0, 64: 3.0}}, "here"),
    }
    for name, figure in drawn.items():
        assert isinstance(figure, Figure)
        assert not any(text.get_parse_math() and "$" in text.get_text() for text in figure.findobj(Text))
        assert isinstance(figure.canvas, FigureCanvasAgg), "another takes a gigabyte at 20 classes"
        figures.save(figure, tmp_path / "new" / f"{name}.png")
        with Image.open(tmp_path / "new" / f"{name}.png") as picture:
            assert min(picture.size) > 300 and np.asarray(picture).std() > 5


def test_confusion_shows_counts_and_row_percent(examples):
    _, labels = examples
    figure = figures.confusion(labels, guesses(labels, 1).argmax(axis=1), CLASSES)
    matrix, colour_bar = figure.axes
    assert [tick.get_text() for tick in matrix.get_yticklabels()] == list(CLASSES)
    assert "errors" in colour_bar.get_ylabel()
    assert {"3", "75.0%", "1", "25.0%", "100.0%"} <= {text.get_text() for text in matrix.texts}
    assert "39 of 40 right (97.50%)" in words(figure)


@pytest.mark.parametrize("count", [60, 400])
def test_the_confusion_of_many_classes_is_neither_large_nor_slow(count, tmp_path):
    labels = np.arange(3 * count) % count
    predicted = np.where(np.arange(3 * count) < count, (labels + 1) % count, labels)
    started = time.perf_counter()
    figure = figures.confusion(labels, predicted, [f"class {index}" for index in range(count)])
    figures.save(figure, tmp_path / "a.png")
    assert time.perf_counter() - started < 10
    assert not figure.axes[0].texts and 50 <= len(figure.axes[0].get_yticklabels()) <= 100
    with Image.open(tmp_path / "a.png") as picture:
        assert max(picture.size) < 3300


def test_a_class_without_images_has_a_row_but_no_scores(examples):
    _, labels = examples
    labels = labels[labels != 3]
    assert "no images" in words(figures.confusion(labels, labels, CLASSES))
    figure = figures.class_scores(labels, labels, CLASSES)
    table = [text.get_text() for text in figure.axes[1].texts]
    assert table.count("–") == 3 and table.count("100.00") == 27
    assert "mean F1 100.00%" in words(figure)


def test_predictions_mark_the_wrong_by_more_than_colour(examples):
    images, labels = examples
    figure = figures.predictions(images, labels, guesses(labels, 2), CLASSES, most=12)
    assert len(figure.axes) == 12
    marked = [axes for axes in figure.axes if "✗" in axes.texts[0].get_text()]
    assert marked == figure.axes[:2]
    assert all(axes.spines["top"].get_linestyle() != "-" for axes in marked)
    assert figure.axes[2].spines["top"].get_linestyle() == "-"
    assert "is 0" in marked[0].texts[1].get_text()


def test_mistakes_come_most_confident_first_with_runner_up_and_truth(examples):
    images, labels = examples
    probabilities = guesses(labels, 7)[::-1]
    figure = figures.mistakes(images[::-1], labels[::-1], probabilities, CLASSES, most=5)
    assert len(figure.axes) == 5
    sure = [float(axes.texts[0].get_text().split("(")[1].rstrip("%)")) for axes in figure.axes]
    assert sure == sorted(sure, reverse=True)
    first = [text.get_text() for text in figure.axes[0].texts]
    assert first[0].startswith("✗ 1") and "then 5" in first[1] and "is 0" in first[1]
    assert "7 of 40 wrong" in words(figure)


def test_no_mistakes_is_said(examples):
    images, labels = examples
    figure = figures.mistakes(images, labels, guesses(labels, 0), CLASSES)
    assert figure.axes == [] and "No mistakes" in words(figure)


def test_bars_name_the_best(examples):
    images, labels = examples
    figure = figures.bars(images[4], guesses(labels, 0)[4], CLASSES, "four.png")
    picture, chart = figure.axes
    assert len(picture.images) == 1 and len(chart.patches) == 10
    assert max(range(10), key=lambda row: chart.patches[row].get_width()) == 4
    assert "four.png" in words(figure) and "predicted 4" in words(figure)


def test_torch_tensors_and_colour_images_are_taken(examples):
    _, labels = examples
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    probabilities = torch.tensor(guesses(labels, 3), dtype=torch.float32)
    labels = torch.tensor(labels)
    assert len(figures.predictions(images, labels, probabilities, CLASSES).axes) == 40
    assert len(figures.mistakes(images, labels, probabilities, CLASSES).axes) == 3
    assert len(figures.confusion(labels, probabilities.argmax(1), CLASSES).axes) == 2


def test_save_says_why_it_cannot(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        figures.save(Figure(), tmp_path / "file" / "a.png")


def test_the_callers_style_is_left_alone(examples):
    import matplotlib
    before = dict(matplotlib.rcParams)
    figures.class_scores(examples[1], examples[1], CLASSES)
    assert dict(matplotlib.rcParams) == before


def test_the_hardest_are_the_closest_calls_right_or_wrong(examples):
    images, labels = examples
    probabilities = guesses(labels, 0)
    for index, (first, second) in {3: (0.5, 0.49), 8: (0.6, 0.3)}.items():
        probabilities[index] = 0.001
        probabilities[index, (labels[index] + 1) % 10], probabilities[index, labels[index]] = first, second
    figure = figures.hardest(images, labels, probabilities, CLASSES, most=3)
    words_of = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert words_of[0] == ["✗ 4 (50.0%)", "or 3 (49.0%)?\nis 3"]
    assert words_of[1] == ["✗ 9 (60.0%)", "or 8 (30.0%)?\nis 8"]
    assert not words_of[2][0].startswith("✗") and "1 of these 3 right" in words(figure)


def test_calibration_by_hand_and_of_a_calibrated_model(seed):
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    mean, accuracy, count, error = figures.calibration(labels, probabilities, bins=10)
    assert count.tolist() == [0] * 8 + [4, 0] and error == pytest.approx(0.15)
    assert (mean[8], accuracy[8]) == pytest.approx((0.9, 0.75)) and np.isnan(mean[0])
    probabilities = torch.randn(20000, 10).softmax(-1).numpy()
    labels = torch.multinomial(torch.tensor(probabilities), 1)[:, 0].numpy()
    assert figures.calibration(labels, probabilities)[3] < 0.03
    assert figures.calibration(labels, np.eye(10)[labels])[3] == 0


def test_wilsons_interval_by_hand_and_where_all_are_right():
    low, high = figures.wilson([0.5, 0.9, 0, 1, 1], [10, 50, 10, 10, 1])
    assert low == pytest.approx([0.2366, 0.7864, 0, 0.7225, 0.2065], abs=1e-4)
    assert high == pytest.approx([0.7634, 0.9565, 0.2775, 1, 1], abs=1e-4)


def test_a_bin_of_right_answers_alone_has_an_interval(examples):
    _, labels = examples
    chart = figures.reliability(labels, guesses(labels, 0)).axes[0]
    ends = np.concatenate(chart.collections[0].get_segments())[:, 1]
    assert ends.min() < 95 and ends.max() == 100


def test_performance_has_a_labelled_bar_for_each_model_and_batch():
    rates = {"mamba": {1: 110.0, 64: 1200.0}, "lstm": {1: 130.0, 64: 1400.0}}
    _, axes = figures.performance([("parameters", "1")], rates, "here").axes
    assert [bar.get_width() for bar in axes.patches] == [110.0, 1200.0, 130.0, 1400.0]
    assert [text.get_text() for text in axes.texts] == ["110 mamba", "1,200 mamba", "130 lstm", "1,400 lstm"]
    places = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert places[0] < places[2] < places[1] < places[3], "models side by side for each batch"


def test_reliability_tells_the_error_and_leaves_empty_bins_out(examples):
    _, labels = examples
    probabilities = guesses(labels, 7)
    error = figures.calibration(labels, probabilities)[3]
    figure = figures.reliability(labels, probabilities)
    assert f"expected calibration error {100 * error:.2f}%" in words(figure)


def test_logarithmic_axes_have_plain_numbers(examples):
    _, labels = examples
    reliability = figures.reliability(labels, guesses(labels, 7))
    growth = figures.growth({"a": [(1, 0.01), (100, 1e6)]}, "title", "subtitle", "x", "y")
    for figure, shown in ((reliability, {"1", "10"}), (growth, {"0.01", "1", "1,000,000"})):
        figure.canvas.draw()
        labels = {text.get_text() for text in figure.axes[-1].get_yticklabels(which="both")}
        assert shown <= labels and not any("$" in label for label in labels)


def test_robustness_shows_every_curve_and_example():
    pictures = {name: np.zeros((3, 1, 8, 8), np.uint8) for name in curves()}
    figure = figures.robustness(curves(), pictures)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(curves())
    assert all(len(axes.child_axes) == 3 for axes in figure.axes)
    assert all([text.get_text() for text in axes.texts] == ["90", "50", "10"] for axes in figure.axes)


def test_the_colours_of_errors_grow_darker_in_grey_print():
    grey = figures.ERRORS(np.linspace(0, 1, 64))[:, :3] @ (0.299, 0.587, 0.114)
    assert (np.diff(grey) < 0).all()


def test_long_names_do_not_run_into_each_other(examples):
    images, labels = examples
    classes = [f"{name}_and_something_longer" for name in LONG]
    for draw in (figures.predictions, figures.mistakes, figures.hardest):
        figure = draw(images, labels, guesses(labels, 40), classes)
        assert not overlaps([text for axes in figure.axes for text in axes.texts]), draw.__name__


def test_the_subtitle_of_a_few_pictures_is_not_cut_off(examples):
    images, labels = examples
    for draw in (figures.predictions, figures.mistakes, figures.hardest):
        figure = draw(images[:2], labels[:2], guesses(labels[:2], 1), LONG)
        assert max(text.get_window_extent().x1 for text in figure.texts) < figure.bbox.width, draw.__name__


def overlaps(texts: list[Text]) -> list[tuple[str, str]]:
    """The pairs of level texts that are written over each other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts
             if text.get_text() and not text.get_rotation()]
    return [(a, b) for number, (a, one) in enumerate(boxes) for b, two in boxes[:number] if one.overlaps(two)]


@pytest.mark.parametrize("classes", [LONG, [10 * f"{name}_" + name for name in LONG]])
def test_long_names_leave_room_for_charts_and_tables(classes, examples, recwarn):
    images, labels = examples
    probabilities = guesses(labels, 7)
    predicted = probabilities.argmax(axis=1)
    runs = [f"checkpoints/{name}/{20 * 'run'}-2026-11-28-lr-0.001" for name in "abc"]
    table = [("", runs), ("accuracy", "123")]
    for figure in (figures.comparison(table, labels, [predicted] * 3, classes, "here"),
                   figures.class_scores(labels, predicted, classes),
                   figures.bars(images[0], probabilities[0], classes, 60 * "four" + ".png\n\x1b[31m"),
                   figures.confusion(labels, predicted, classes)):
        figure.canvas.draw()
        texts = [*figure.texts]
        for axes in figure.axes:
            ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()] if axes.axison else []
            texts += [axes.title, *axes.texts, *ticks]
        assert not overlaps(texts)
        boxes = [text.get_window_extent() for text in texts]
        assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.width
        assert not any(letter in text.get_text() for text in figure.texts for letter in "\n\x1b")
    assert not recwarn.list, "such as of axes that collapsed"


def test_names_in_any_script_are_drawn_without_a_warning(examples, tmp_path, recwarn, caplog):
    images, labels = examples
    classes = ("猫", "狗", "고양이", "鳥", "ねこ", "कमल", "بيت", "\U000f0000", "🐈", "b")
    probabilities = guesses(labels, 7)
    for figure in (figures.confusion(labels, probabilities.argmax(axis=1), classes),
                   figures.bars(images[0], probabilities[0], classes, "猫.png"),
                   figures.mistakes(images, labels, probabilities, classes)):
        figures.save(figure, tmp_path / "a.png")
    assert not recwarn.list and not caplog.records


def test_a_font_that_is_there_stands_in_for_dejavus_missing_glyphs(monkeypatch):
    monkeypatch.setattr(figures, "FALLBACKS", ("Nowhere Sans", "STIXGen", "DejaVu Ser"))
    assert figures.fonts() == ["DejaVu Sans", "STIXGeneral", "DejaVu Serif"]
    assert figures.STYLE["font.family"][0] == "DejaVu Sans"


def test_a_name_is_shortened_in_its_middle():
    assert figures._short("automobile") == "automobile"
    assert figures._short("class_of_things_017") == "class…017"
    assert len(figures._short(100 * "a", 24)) == 24 and figures._short("a\nb\ud800") == "a?b?"
