"""Ready Pyro models: the parameter sites with their priors and the simulator site."""

from pyrobirds.models.random_walk import random_walk

__all__ = ["random_walk"]
