"""Simulators: what turns a user's function into a Pyro distribution, and reference simulators, batched over draws."""

from pyrobirds.simulators import relaxations
from pyrobirds.simulators.brock_hommes import brock_hommes
from pyrobirds.simulators.graphs import Graph
from pyrobirds.simulators.normal import normal
from pyrobirds.simulators.rama_cont import rama_cont
from pyrobirds.simulators.random_walk import random_walk
from pyrobirds.simulators.repeats import repeated
from pyrobirds.simulators.rollout import rollout
from pyrobirds.simulators.simulator import Simulator
from pyrobirds.simulators.sir import sir

__all__ = [
    "Graph",
    "Simulator",
    "brock_hommes",
    "normal",
    "rama_cont",
    "random_walk",
    "relaxations",
    "repeated",
    "rollout",
    "sir",
]
