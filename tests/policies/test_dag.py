import numpy as np

from roundel.policies.dag import Dag


def dag_of(edges: list[tuple[int, int]], durations: list[int], held: list[int] = ()) -> Dag:
    before, after = np.array(edges).T if edges else (np.zeros(0, int), np.zeros(0, int))
    flags = np.zeros(len(durations), dtype=np.bool_)
    flags[list(held)] = True
    return Dag(before, after, np.array(durations), flags)


def test_a_task_starts_when_the_last_it_waits_for_is_done() -> None:
    dag = dag_of([(0, 2), (1, 2), (2, 3)], [5, 9, 1, 1])
    assert dag.run_roots() == []
    assert dag.start_ns.tolist() == [0, 0, 9, 10]
    assert dag.end_ns.tolist() == [5, 9, 10, 11]


def test_a_held_task_ends_when_it_is_released() -> None:
    dag = dag_of([(0, 1), (1, 2)], [5, 0, 1], held=[1])
    assert dag.run_roots() == [1]
    assert dag.start_ns[1] == 5
    assert dag.release(1, 25) == []
    assert dag.end_ns.tolist() == [5, 25, 26]


def test_a_held_root_is_returned() -> None:
    assert dag_of([(0, 1)], [1, 1], held=[0]).run_roots() == [0]


def test_tasks_in_a_circle_stay_blocked() -> None:
    dag = dag_of([(1, 2), (2, 1), (2, 3)], [1, 1, 1, 1])
    dag.run_roots()
    assert list(dag.blocked()) == [1, 2, 3]


def test_rank_keeps_the_order_of_tasks_without_duration() -> None:
    dag = dag_of([(3, 1), (1, 0)], [0, 0, 7, 0])
    dag.run_roots()
    rank = dag.rank()
    assert rank[3] < rank[1] < rank[0] < rank[2]
