"""`hf-wash report`: the report of a run, from what its folder holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..sentences import first_line
from .images import ImageFolder
from .terminal import note, quiet, say


_RECALIBRATION_BATCHES = 8


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    eval_data: Annotated[
        Path | None,
        typer.Option(help="A folder of images, one folder for each class: measure members and soup on 256 of them."),
    ] = None,
    train_data: Annotated[
        Path | None, typer.Option(help="A folder of images on which BatchNorm statistics are re-estimated.")
    ] = None,
    plane: Annotated[
        bool, typer.Option("--plane", help="Measure the loss on the plane through the first three members, too.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, where there are images.")] = 64,
) -> None:
    """Write the report of a run, report/index.html: how soup and members fared, how far apart they are, what was sent.

    What was measured at the end of training is shown as it was kept. With --eval-data the lines between members, their
    disagreement and their calibration are measured anew, from the soup and the members that were saved, and with --plane
    the plane through the first three members, on 9 × 9 points.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if train_data is not None and eval_data is None:
        raise ValueError("--train-data is for measuring on --eval-data, which is missing.")
    if plane and eval_data is None:
        raise ValueError("--plane is measured on --eval-data, which is missing.")
    for option, images in (("--eval-data", eval_data), ("--train-data", train_data)):
        if images is not None and not images.is_dir():
            raise ValueError(f"{option} must be a folder of images, and there is no folder {images}.")

    from ..report.gather import gather
    from ..report.page import can_draw, write_report

    if not can_draw():
        raise ValueError('A report needs matplotlib: pip install "hf-wash[report]".')
    steps = gather(folder).steps  # what is wrong with the folder is said before anything is measured
    surveyed = None
    if eval_data is not None:
        quiet()
        surveyed = _measure(folder, eval_data, train_data, batch_size, steps or 0, plane)
    page = write_report(folder, surveyed=surveyed)
    say(f"The report is {page}.")


def _measure(
    folder: Path, eval_data: Path, train_data: Path | None, batch_size: int, step: int, plane: bool
) -> dict[str, Any]:
    import copy
    import functools

    import torch

    from ..hub.loading import load_members, load_model
    from ..population import Population
    from ..report.survey import EXAMPLES, PLANE_OF, Answers, choose_examples, survey
    from ..soup import has_batch_norm, recalibrate_batch_norm

    soup, members = load_model(folder), load_members(folder)
    if plane and len(members) < PLANE_OF:
        raise ValueError(f"--plane goes through three members, and {folder} holds {len(members)}.")
    images = ImageFolder(eval_data, folder, batch_size)
    labels_of = torch.tensor(images.labels_for(soup))
    images.dataset = images.dataset.select(choose_examples(len(images), EXAMPLES))
    batches = [(batch["pixel_values"], labels_of[torch.tensor(batch["classes"])]) for batch in images]
    training: list[dict[str, Any]] = []
    if has_batch_norm(soup) and train_data is not None:
        batch_norm = "re-estimated at every point of a line on the same {} training batches of {} images"
        for batch in ImageFolder(train_data, folder, batch_size, shuffled=True):
            if training and len(batch["pixel_values"]) < len(training[0]["pixel_values"]):
                break  # the last one, perhaps of a single image, which has no variance
            training.append({"pixel_values": batch["pixel_values"]})
            if len(training) == _RECALIBRATION_BATCHES:
                break
        batch_norm = batch_norm.format(len(training), len(training[0]["pixel_values"]))
    elif has_batch_norm(soup):
        batch_norm = "mixed as the weights are, since no training data was named (--train-data)"
        note("BatchNorm statistics on the lines are mixed as the weights are: --train-data FOLDER re-estimates them.")
    else:
        batch_norm = None
    population = Population(len(members), torch.device("cpu"))
    population.members.extend(members)
    scratch = copy.deepcopy(soup)

    def answers_of(model: Any) -> Answers:
        with torch.no_grad():
            try:
                logits = torch.cat([model(pixel_values=pixels).logits for pixels, _ in batches]).float()
            except Exception as error:  # of any kind: images of another size, a configuration that makes no sense
                raise ValueError(f"A model does not take the images of {eval_data}: {first_line(error)}") from error
        labels = torch.cat([own for _, own in batches])
        return Answers(float(torch.nn.functional.cross_entropy(logits, labels)), logits, labels)

    def answer_at(weights: Any) -> Answers:
        scratch.load_state_dict(weights)
        if training:
            recalibrate_batch_norm(scratch, training)
        return answers_of(scratch)

    try:
        return survey(
            population,
            step=step,
            soup_weights=soup.state_dict(),
            answer_at=answer_at,
            as_they_are=[functools.partial(answers_of, member) for member in members],
            soup_as_it_is=functools.partial(answers_of, soup),
            about={
                "examples": len(images),
                "data": f"{eval_data.name or eval_data}, evenly spaced",
                "batch_norm": batch_norm,
            },
            plane=plane,
        )
    except RuntimeError as error:
        raise ValueError(f"{folder} could not be measured: {error}") from error
