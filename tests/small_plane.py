"""Members of three weights, whose loss is known everywhere: what the plane through three of them has to look like."""

import torch
from torch import nn

from hf_wash.population import Population
from hf_wash.report.survey import Answers, survey


# Member 1 is 4 along the first axis, member 2 lies 2 along it and 3 across; member 3 and the soup are elsewhere.
WEIGHTS = [[1.0, 0.0, 2.0], [5.0, 0.0, 2.0], [3.0, 3.0, 2.0], [9.0, 9.0, 9.0]]
SOUP = [3.0, 1.0, 4.0]


def answer_at(weights):
    """A bowl around (3, 1, 2)."""
    return Answers(float((weights["weight"][0] - torch.tensor([3.0, 1.0, 2.0])).square().sum()))


def member(weights):
    made = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([weights]))
    return made


def surveyed(rank=0, world_size=1, weights=WEIGHTS, answer_at=answer_at):
    """*Collective.* What is measured of these members, dealt to so many processes."""
    population = Population(len(weights), torch.device("cpu"), rank, world_size)
    population.members.extend(member(weights[index]) for index in population.indices)
    return survey(
        population,
        step=1,
        soup_weights=member(SOUP).state_dict(),
        answer_at=answer_at,
        as_they_are=[lambda: Answers(0.0)] * len(population.indices),
        soup_as_it_is=lambda: Answers(0.0),
        plane=True,
    )
