"""Contact graphs: sums over neighbours against dense matrices and networkx, gradients in both modes, and errors."""

from __future__ import annotations

import pickle
import re
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor

from pyrobirds.simulators import Graph

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
PARALLEL = networkx.MultiDiGraph([("a", "b"), ("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")])
GRAPHS: dict[str, Any] = {
    "undirected": networkx.watts_strogatz_graph(12, 4, 0.3, seed=0),
    "directed": networkx.gnp_random_graph(12, 0.2, seed=0, directed=True),
    "labels": networkx.relabel_nodes(networkx.path_graph(5), dict(enumerate("edcba"))),
    "parallel edges": PARALLEL,
    "parallel undirected edges": networkx.MultiGraph(PARALLEL),
    "complete": networkx.complete_graph(7),
    "complete, directed": networkx.complete_graph(7, networkx.DiGraph),
    "almost complete": networkx.MultiDiGraph([(0, 1), (0, 1), (1, 0), (1, 2), (2, 0), (2, 1)]),
    "no edges": networkx.empty_graph(3),
    "one agent": networkx.empty_graph(1),
}


@pytest.fixture(params=GRAPHS)
def networks(request: pytest.FixtureRequest) -> tuple[Graph, Tensor]:
    """A graph, and who acts on whom: entry (v, u) counts the edges from u to v."""
    graph = GRAPHS[request.param]
    matrix = networkx.to_numpy_array(graph, weight=None).T
    return Graph(graph), torch.as_tensor(np.asarray(matrix))


def test_sums_are_those_of_the_matrix(networks: tuple[Graph, Tensor]) -> None:
    graph, matrix = networks
    assert (graph.n_agents, graph.n_edges) == (len(matrix), int(matrix.sum()))
    assert graph.max_in_degree == int(matrix.sum(1).max())
    for dtype in (torch.float32, torch.float64):
        x = torch.randint(10, (len(matrix), 3)).to(dtype)  # sums of whole numbers are exact
        assert torch.equal(graph.neighbour_sum(x), matrix.to(dtype) @ x)
        assert torch.equal(graph.neighbour_sum(x.T.contiguous().T), matrix.to(dtype) @ x)
        total = torch.ones_like(x)
        assert torch.equal(graph.add_sum(total, x, transposed=True), 1 + matrix.T.to(dtype) @ x)


def test_derivatives_in_both_modes(networks: tuple[Graph, Tensor]) -> None:
    graph, matrix = networks
    x = torch.randn(len(matrix), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(graph.neighbour_sum, x, check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(graph.neighbour_sum, x)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_folds_its_dimension_into_columns(networks: tuple[Graph, Tensor], dim: int) -> None:
    graph, matrix = networks
    x = torch.randint(10, (len(matrix), 2, 4)).double().movedim(-1, dim)
    got = torch.vmap(graph.neighbour_sum, in_dims=dim, out_dims=dim)(x)
    assert torch.equal(got.movedim(dim, -1), torch.einsum("vu,uck->vck", matrix, x.movedim(dim, -1)))


def test_complete_graphs_are_recognised() -> None:
    complete = [name for name, graph in GRAPHS.items() if Graph(graph).is_complete]
    assert complete == ["complete", "complete, directed", "one agent"]
    x = torch.randn(7, 2, dtype=torch.float64)
    made = Graph.complete(7)
    assert made.is_complete
    assert (made.n_agents, made.n_edges, made.max_in_degree) == (7, 42, 6)
    assert torch.equal(made.neighbour_sum(x), Graph(GRAPHS["complete"]).neighbour_sum(x))


def test_a_tensor_of_edges_is_directed_unless_said_otherwise() -> None:
    edges = torch.tensor([[0, 1, 1], [1, 2, 2]], dtype=torch.int32)
    x = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    assert Graph(edges).neighbour_sum(x[:3]).flatten().tolist() == [0, 1, 20]
    assert Graph(edges, 4).neighbour_sum(x).flatten().tolist() == [0, 1, 20, 0]
    both = Graph(edges, 4, undirected=True)
    assert both.neighbour_sum(x).flatten().tolist() == [10, 201, 20, 0]
    assert both.n_edges == 6


def test_graphs_are_hashable_pickled_and_say_what_they_are() -> None:
    graph = Graph(GRAPHS["directed"])
    x = torch.ones(12, 1)
    sums = graph.neighbour_sum(x)
    copy = pickle.loads(pickle.dumps(graph))
    assert torch.equal(copy.neighbour_sum(x), sums)
    assert len({graph, graph, copy}) == 2
    assert repr(graph) == f"Graph(n_agents=12, n_edges={GRAPHS['directed'].number_of_edges()})"


def test_a_graph_of_a_graph_is_a_copy(networks: tuple[Graph, Tensor]) -> None:
    graph, matrix = networks
    copy = Graph(graph)
    assert copy is not graph
    assert (copy.is_complete, copy.n_edges, copy.max_in_degree) == (
        graph.is_complete,
        graph.n_edges,
        graph.max_in_degree,
    )
    x = torch.randint(10, (len(matrix), 2)).double()
    assert torch.equal(copy.neighbour_sum(x), matrix @ x)


def test_the_remedy_for_a_sparse_matrix_of_contacts() -> None:
    matrix = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]])  # from row to column
    for sparse in (matrix.to_sparse(), matrix.to_sparse_csr()):
        graph = Graph(sparse.to_sparse_coo().coalesce().indices())
        x = torch.tensor([[1.0], [10.0], [100.0]])
        assert torch.equal(graph.neighbour_sum(x), matrix.T.float() @ x)


EDGES = torch.tensor([[0, 1], [1, 2]])
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "floats": (lambda: Graph(EDGES.float()), TypeError, "as integers, got torch.float32: use graph.long()"),
    "a mask": (lambda: Graph(EDGES > 0), TypeError, "as integers, got torch.bool"),
    "pairs": (lambda: Graph(torch.zeros(5, 2, dtype=int)), ValueError, "shape (5, 2), expected (2, n_edges)"),
    "negative": (lambda: Graph(EDGES - 1), ValueError, "names agent -1, but there are 2 agents, 0 to 1"),
    "out of range": (lambda: Graph(EDGES, 2), ValueError, "names agent 2, but there are 2 agents, 0 to 1"),
    "no edges": (lambda: Graph(EDGES[:, :0]), ValueError, "nothing says how many agents there are: pass n_agents"),
    "no agents": (lambda: Graph(EDGES, 0), ValueError, "n_agents must be at least 1, got 0"),
    "empty": (lambda: Graph(networkx.Graph()), ValueError, "graph has no agents: add nodes to it"),
    "both ways": (
        lambda: Graph(torch.tensor([[0, 1, 2], [1, 0, 1]]), undirected=True),
        ValueError,
        "an edge from 0 to 1 and one back, and undirected=True would count both twice",
    ),
    "loop": (lambda: Graph(torch.tensor([[0, 1], [1, 1]])), ValueError, "joins agent 1 to itself"),
    "loop, undirected": (
        lambda: Graph(networkx.Graph([(0, 1), (1, 1)])),
        ValueError,
        "joins agent 1 to itself, which no contact does: leave such edges out, for networkx by graph.remove_edges_from",
    ),
    "loop, directed": (lambda: Graph(networkx.DiGraph([(0, 1), (1, 1)])), ValueError, "joins agent 1 to itself"),
    "undirected": (lambda: Graph(EDGES, undirected=1), TypeError, "undirected must be True or False, got 1"),
    "n_agents": (lambda: Graph(EDGES, 2.5), TypeError, "n_agents must be a whole number of at least 1, got 2.5"),
    "networkx": (lambda: Graph(GRAPHS["complete"], 7), TypeError, "belong to a tensor of edges"),
    "a Graph": (lambda: Graph(Graph.complete(7), 7), TypeError, "belong to a tensor of edges"),
    "a list": (
        lambda: Graph([(0, 1)]),
        TypeError,
        "a networkx graph, or an integer tensor of edges of shape (2, n_edges)",
    ),
    "numpy": (lambda: Graph(EDGES.numpy()), TypeError, "got a ndarray: pass torch.from_numpy(graph)"),
    "sparse": (
        lambda: Graph(EDGES.to_sparse()),
        TypeError,
        "dense tensor of edges, got one of torch.sparse_coo: of a sparse matrix of contacts take graph.to_sparse_coo(",
    ),
    "sparse floats": (lambda: Graph(torch.eye(3).to_sparse()), TypeError, "a dense tensor of edges"),
    "complete": (lambda: Graph.complete(0), ValueError, "n_agents must be at least 1, got 0"),
    "x": (lambda: Graph(EDGES).neighbour_sum(torch.zeros(3)), ValueError, "x has shape (3,), expected (3, n_columns)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()
