"""Ready Pyro models: the parameter sites with their priors and the simulator site."""

from pyrobirds.models.brock_hommes import brock_hommes
from pyrobirds.models.normal import normal
from pyrobirds.models.rama_cont import rama_cont
from pyrobirds.models.random_walk import random_walk
from pyrobirds.models.sir import sir

__all__ = ["brock_hommes", "normal", "rama_cont", "random_walk", "sir"]
