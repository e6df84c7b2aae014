"""Admission, fair queueing, what may be merged, and quarantine: each by itself."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback_server.faults import Fault
from pullback_server.job import BatchRecord, Job, LossCall, OrdersRecord, Signature, SpecRecord, TensorRef, Wrt
from pullback_server.scheduling.admission import Admission, Limits
from pullback_server.scheduling.costs import UNKNOWN, Costs
from pullback_server.scheduling.merging import mergeable
from pullback_server.scheduling.quarantine import Quarantine
from pullback_server.scheduling.queue import FairQueue, Lane, Origin, Ticket, computations
from pullback_wire import Reason
from pullback_wire.dtypes import dtype_number

F32, F64 = dtype_number("float32"), dtype_number("float64")


def on_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def lane(key: object = "a", rows: int = 1, size: int = 1 << 30) -> Lane:
    return Lane(key, ("m", "1"), None, rows, size)


def ticket(where: Lane, caller: str, cost: float = 1.0, rows: int = 1, size: int = 0, urgent: bool = False) -> Ticket:
    return Ticket(where, Origin(caller, urgent), "kind", cost, 0.0, 1e9, None, (), rows, size)


def put(queue: FairQueue, *tickets: Ticket) -> None:
    for each in tickets:
        queue.tag(each)
        queue.push(each)


def first_of(queue: FairQueue) -> Ticket:
    return min(queue.firsts())


def serve(queue: FairQueue, count: int | None = None) -> list[Ticket]:
    """Serves one after the other."""
    served: list[Ticket] = []
    while queue and (count is None or len(served) < count):
        served.append(queue.instead_of(first_of(queue)))
        queue.serve(served[-1:])
    return served


def callers(tickets: list[Ticket]) -> list[str]:
    return [each.origin.caller for each in tickets]


def test_a_caller_with_one_call_goes_before_most_of_a_flood() -> None:
    async def work() -> None:
        queue = FairQueue({})
        put(queue, *(ticket(lane(), "flood") for _ in range(50)))
        serve(queue, 10)
        put(queue, ticket(lane(), "polite"))
        assert callers(serve(queue)).index("polite") <= 1

    on_loop(work)


def test_shares_follow_the_weights() -> None:
    async def work() -> None:
        queue = FairQueue({"heavy": 3.0})
        for _ in range(60):
            put(queue, ticket(lane(), "light"), ticket(lane(), "heavy"))
        assert callers(serve(queue, 40)).count("heavy") in (29, 30, 31)

    on_loop(work)


def test_shares_are_of_time_and_not_of_calls() -> None:
    async def work() -> None:
        queue = FairQueue({})
        for _ in range(60):
            put(queue, ticket(lane(), "slow", cost=4.0), ticket(lane(), "quick", cost=1.0))
        assert callers(serve(queue, 50)).count("slow") in (9, 10, 11)

    on_loop(work)


def test_what_a_call_costs_in_truth_is_charged() -> None:
    """One by one: a caller whose calls take four times as long as thought gets a quarter of the calls."""

    async def work() -> None:
        queue = FairQueue({})
        served = []
        put(queue, *(ticket(lane(), "quick") for _ in range(40)), ticket(lane(), "slow"))
        for _ in range(40):
            (one,) = serve(queue, 1)
            served.append(one)
            if one.origin.caller == "slow":
                queue.settle(one, 4.0)
                put(queue, ticket(lane(), "slow"))
        assert callers(served).count("slow") in (8, 9, 10)

    on_loop(work)


def test_riders_of_a_batch_do_not_move_the_clock() -> None:
    """A caller in a lane that merges, served many at once, is not thereby let off what that costs."""

    async def work() -> None:
        queue = FairQueue({})
        merged = lane("merged", rows=100)
        put(queue, *(ticket(merged, "flood") for _ in range(10)))
        queue.serve(merged.group())
        put(queue, ticket(merged, "flood"), *(ticket(lane(), "other") for _ in range(9)))
        assert callers(serve(queue))[-1] == "flood"

    on_loop(work)


def test_urgent_calls_go_before_the_same_callers_others_and_not_at_others_cost() -> None:
    async def work() -> None:
        queue = FairQueue({})
        put(queue, *(ticket(lane(), "one") for _ in range(20)))
        serve(queue, 2)
        put(queue, *(ticket(lane(), "one", urgent=True) for _ in range(3)))
        served = serve(queue)
        assert [each.origin.urgent for each in served] == [True] * 3 + [False] * 18
        # In the order in which they came.
        assert [each.came for each in served] == sorted(each.came for each in served[:3]) + sorted(
            each.came for each in served[3:]
        )
        # With nothing but urgent calls a caller has a share as anybody else.
        for _ in range(40):
            put(queue, ticket(lane(), "one", urgent=True), ticket(lane(), "other"))
        assert callers(serve(queue, 40)).count("other") in (19, 20, 21)

    on_loop(work)


def test_a_group_has_what_fits_and_begins_with_who_is_first() -> None:
    async def work() -> None:
        queue = FairQueue({})
        where = lane(rows=8, size=100)
        tickets = [ticket(where, caller, rows=3, size=10) for caller in ("a", "b", "c", "a")]
        put(queue, *tickets)
        assert where.group() == tickets[:2]
        queue.serve(tickets[:2])
        large = [ticket(where, "d", rows=1, size=95), ticket(where, "e", rows=1, size=95)]
        put(queue, *large)
        # By tags: the first caller's second call comes last, and the large ones fit with nobody.
        for expected in (tickets[2], large[0], large[1], tickets[3]):
            assert where.group() == [expected]
            queue.serve([expected])

    on_loop(work)


def test_those_who_gave_up_are_neither_served_nor_kept() -> None:
    async def work() -> None:
        queue = FairQueue({})
        where = lane(rows=100)
        tickets = [ticket(where, "a") for _ in range(500)]
        put(queue, *tickets)
        for each in tickets[:-1]:
            queue.out(each)
            queue.out(each)
        assert len(queue) == 1 and where.rows == 1 and queue.cost == pytest.approx(1.0)
        assert len(where.tickets) < 140
        assert where.group() == [tickets[-1]]
        queue.serve(where.group())
        assert len(queue) == 0 and queue.cost == 0.0 and not list(queue.firsts())
        assert queue.oldest() is None and queue.latest_call_of("a") is None
        assert not queue._lanes and not queue._places

    on_loop(work)


def test_the_latest_call_of_a_caller_is_no_op_of_a_session() -> None:
    async def work() -> None:
        queue = FairQueue({})
        first, second = ticket(lane(), "a"), ticket(lane("b"), "a")
        first.job = second.job = job()
        put(queue, first, second, ticket(lane("op"), "a"))
        assert queue.latest_call_of("a") is second
        queue.out(second)
        assert queue.latest_call_of("a") is first and len(queue) == 2

    on_loop(work)


def test_who_goes_before_a_ticket() -> None:
    async def work() -> None:
        queue = FairQueue({})
        put(queue, *(ticket(lane("m", rows=4), "flood", rows=2) for _ in range(6)))
        newcomer = ticket(lane(), "polite")
        queue.tag(newcomer)
        ahead = list(queue.ahead_of(newcomer))
        assert [(found.key, len(tickets)) for found, tickets in ahead] == [("m", 1)]
        last = ticket(lane(), "flood")
        queue.tag(last)
        ((where, tickets),) = queue.ahead_of(last)
        assert len(tickets) == 6 and computations(where, tickets) == 3

    on_loop(work)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.01, 10)), min_size=1, max_size=60))
def test_nobody_gets_more_than_his_share_while_others_wait(calls: list[tuple[str, float]]) -> None:
    """SFQ's bound: the service of two flows that both wait differs by at most one call of each."""

    async def work() -> None:
        queue = FairQueue({})
        left = {caller: sum(1 for one, _ in calls if one == caller) for caller in "abc"}
        put(queue, *(ticket(lane(), caller, cost=cost) for caller, cost in calls))
        largest = {caller: max((cost for one, cost in calls if one == caller), default=0.0) for caller in "abc"}
        got = dict.fromkeys("abc", 0.0)
        while queue:
            (head,) = serve(queue, 1)
            caller = head.origin.caller
            left[caller] -= 1
            got[caller] += head.cost
            waiting = [one for one in "abc" if left[one]]
            for one, other in itertools.combinations(waiting, 2):
                assert abs(got[one] - got[other]) <= largest[one] + largest[other] + 1e-9

    on_loop(work)


def test_finish_tags_of_those_who_went_are_forgotten() -> None:
    async def work() -> None:
        queue = FairQueue({})
        put(queue, ticket(lane(), "stays"))
        for index in range(5000):
            one = ticket(lane(), f"caller {index}")
            put(queue, one)
            queue.serve([one])
        assert len(queue._finish) <= 2 * 1024 + 2 or len(queue) == 1
        serve(queue)
        queue.idle()
        assert not queue._finish

    on_loop(work)


def test_limits_name_whose_they_are() -> None:
    admission = Admission(Limits(calls=5, bytes=100, caller_calls=2, caller_bytes=60, model_calls=3, model_bytes=70))
    admission.enter("a", "m", 10)
    admission.enter("a", "m", 10)
    with pytest.raises(Fault, match="2 calls of this caller are in flight, the limit is 2") as raised:
        admission.check("a", "m", 1)
    assert raised.value.reason is Reason.OVERLOADED and raised.value.retry_after is not None
    admission.enter("b", "m", 10)
    with pytest.raises(Fault, match="3 calls for model 'm'"):
        admission.check("c", "m", 1)
    with pytest.raises(Fault, match="30 bytes are in flight and this call brings 71, the limit is 100"):
        admission.check("c", "other", 71)
    with pytest.raises(Fault, match="10 bytes of this caller are in flight and this call brings 51, the limit is 60"):
        admission.check("b", "other", 51)
    admission.leave("b", "m", 10)
    with pytest.raises(Fault, match="20 bytes for model 'm' are in flight and this call brings 55"):
        admission.check("d", "m", 55)


def test_what_never_fits_is_not_to_be_retried() -> None:
    admission = Admission(Limits(calls=5, bytes=100))
    with pytest.raises(Fault) as raised:
        admission.check("a", "m", 101)
    assert raised.value.reason is Reason.RESULT_TOO_LARGE and raised.value.retry_after is None


def test_of_callers_that_left_nothing_stays() -> None:
    admission = Admission(Limits())
    for index in range(100):
        admission.enter(f"caller {index}", "m", 8)
    for index in range(100):
        admission.leave(f"caller {index}", "m", 8)
    assert admission.calls == admission.bytes == 0
    assert not admission.by_caller and not admission._caller_bytes


def test_the_wait_told_follows_the_drain_rate() -> None:
    admission = Admission(Limits())
    assert admission.rate.seconds_for(10) == 0.5
    for _ in range(200):
        admission.rate.answered()
    admission.rate._since -= 2.0
    assert admission.rate.seconds_for(100) == pytest.approx(1.0, rel=0.05)
    assert admission.rate.seconds_for(1) == pytest.approx(0.05)
    assert admission.rate.seconds_for(10**6) == 30.0
    # After an hour of quiet it says nothing of what can be done.
    admission.rate._since -= 3600.0
    assert admission.rate.seconds_for(10) == 0.5


def test_estimates_fall_at_once_and_rise_slowly() -> None:
    costs = Costs()
    assert costs.estimate("m", 3) == 3 * UNKNOWN
    costs.observe("m", 1, 2.0)
    costs.observe("m", 10, 0.1)
    assert costs.estimate("m", 1) == pytest.approx(0.01)
    costs.observe("m", 1, 0.02)
    assert 0.01 < costs.estimate("m", 1) < 0.015
    assert costs.computation("m") == pytest.approx(0.02)


def signature(**batch: Any) -> Signature:
    record = BatchRecord(**{"max_rows": 16, "max_bytes": 1 << 20, "evidence": "probed", "inputs": ["x"], **batch})
    return Signature(
        "m", "1", "", [SpecRecord("x", F32, ("batch", 3))], [], [], 0, [], OrdersRecord(-1, True, ""), "cpu", 0, record
    )


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "kind": "vjp",
        "model": "m",
        "version": "1",
        "loss": None,
        "train": False,
        "seed": None,
        "inputs": [TensorRef("x", F32, (2, 3), 0)],
        "parameters": [],
        "targets": [],
        "wrt": [Wrt("input", "x", "x")],
        "cotangents": [TensorRef("output", F32, (2, 5), 1)],
        "batched": False,
        "tangents": [],
        "allow_unused": False,
        "return_outputs": True,
        "return_cotangent_derivatives": False,
        "result_dtype": 0,
        "max_norm": None,
        "max_result_bytes": 1 << 30,
        "max_cotangents": 10,
    }
    return Job(**{**fields, **changes})


def rows(count: int, dtype: int = F32) -> dict[str, Any]:
    return {
        "inputs": [TensorRef("x", dtype, (count, 3), 0)],
        "cotangents": [TensorRef("output", dtype, (count, 5), 1)],
    }


def test_different_numbers_of_rows_merge() -> None:
    one, other = mergeable(job(), signature()), mergeable(job(**rows(7)), signature())
    assert one is not None and other is not None
    assert one.key == other.key and (one.rows, other.rows) == (2, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "hvp", "tangents": [TensorRef("x", F32, (2, 3), 2)]},
        {"loss": LossCall("mse_loss", {}, {}), "targets": [TensorRef("target", F32, (2, 5), 1)], "cotangents": []},
        rows(2, F64),
        {"cotangents": [TensorRef("output", F32, (2, 6), 1)]},
        {"inputs": [TensorRef("x", F32, (2, 4), 0)]},
        {"wrt": [], "kind": "evaluate", "cotangents": []},
        {"allow_unused": True},
        {"version": "2"},
    ],
)
def test_what_differs_does_not_merge(changes: dict[str, Any]) -> None:
    one, other = mergeable(job(), signature()), mergeable(job(**changes), signature())
    assert one is not None and other is not None
    assert one.key != other.key


@pytest.mark.parametrize("kind", ["sum", "mean", "none"])
def test_losses_merge_with_their_own_options_only(kind: str) -> None:
    def with_loss(reduction: str, shape: tuple[int, ...]) -> Job:
        return job(
            loss=LossCall("cross_entropy", {"reduction": reduction}, {}),
            targets=[TensorRef("target", F32, shape, 1)],
            cotangents=[],
        )

    one, other = mergeable(with_loss(kind, (2,)), signature()), mergeable(with_loss("sum", (9,)), signature())
    assert one is not None and other is not None
    assert (one.key == other.key) == (kind == "sum")


@pytest.mark.parametrize(
    "changes",
    [
        {"train": True},
        {"seed": 1},
        {"parameters": [TensorRef("w", F32, (3,), 2)]},
        {"wrt": [Wrt("input", "x", "x"), Wrt("param", "w", "w")]},
        {"wrt": [Wrt("target", "t", "target:t")]},
        {"batched": True, "cotangents": [TensorRef("output", F32, (4, 2, 5), 1)]},
        {"kind": "jacobian"},
        {"kind": "hessian"},
        {"inputs": []},
        {"inputs": [TensorRef("x", F32, (), 0)]},
        {"inputs": [TensorRef("x", F32, (0, 3), 0)]},
        {"inputs": [TensorRef("x", F32, (2, 3), 0), TensorRef("y", F32, (3, 3), 1)]},
        {"cotangents": [TensorRef("output", F32, (), 1)]},
        rows(16),
        rows(100),
    ],
)
def test_what_never_merges(changes: dict[str, Any]) -> None:
    assert mergeable(job(**changes), signature()) is None


def test_without_a_batch_axis_nothing_merges() -> None:
    plain = signature(max_rows=0)
    assert mergeable(job(), plain) is None
    assert mergeable(job(), signature(max_rows=1)) is None


def test_quarantine_knows_a_call_by_its_contents() -> None:
    async def work() -> None:
        quarantine = Quarantine(100.0)
        large = bytes(2 << 20)
        for payloads in ([b"x", b"v"], [large, b"v"]):
            await quarantine.check(job(), payloads)
            await quarantine.victim(job(), payloads)
            await quarantine.check(job(), payloads)
            await quarantine.victim(job(), payloads)
            with pytest.raises(Fault, match="has cost 2 workers") as raised:
                await quarantine.check(job(), payloads)
            assert raised.value.reason is Reason.QUARANTINED
        await quarantine.check(job(), [b"x", b"w"])
        await quarantine.check(job(allow_unused=True), [b"x", b"v"])
        await quarantine.check(job(model="other"), [b"x", b"v"])
        assert len(quarantine) == 2

    on_loop(work)


def test_quarantine_is_not_fooled_by_the_order_of_options() -> None:
    async def work() -> None:
        quarantine = Quarantine(100.0)
        one = job(loss=LossCall("cross_entropy", {"reduction": "sum", "label_smoothing": 0.1}, {}))
        other = job(loss=LossCall("cross_entropy", {"label_smoothing": 0.1, "reduction": "sum"}, {}))
        await quarantine.victim(one, [b"x"], 2)
        with pytest.raises(Fault):
            await quarantine.check(other, [b"x"])

    on_loop(work)


def test_quarantine_ends_and_is_bounded() -> None:
    async def work() -> None:
        quarantine = Quarantine(0.0)
        await quarantine.victim(job(), [b"x"], 2)
        await quarantine.check(job(), [b"x"])
        assert len(quarantine) == 0
        lasting = Quarantine(100.0)
        for index in range(1000):
            await lasting.victim(job(), [str(index).encode()], 2)
        assert len(lasting) == 256

    on_loop(work)
