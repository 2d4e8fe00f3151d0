"""Simulators: what turns a user's function into a Pyro distribution, and reference simulators, batched over draws."""

from pyrobirds.simulators.random_walk import random_walk
from pyrobirds.simulators.repeats import repeated
from pyrobirds.simulators.simulator import Simulator

__all__ = ["Simulator", "random_walk", "repeated"]
