"""Compiled programs: each once, in the background, until there is no room."""

import threading

import optax
import pytest

from ghn_jax.engine import programs
from ghn_jax.engine.programs import Program, Programs
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.training.update import MetaStep


class Maker:
    """Compiles a function that tells its name; counts how often."""

    def __init__(self, name, begin=None, error=None):
        self.name, self.begin, self.error, self.count = name, begin, error, 0
        self.started = threading.Event()

    def __call__(self):
        self.started.set()
        if self.begin:
            assert self.begin.wait(10)
        self.count += 1
        if self.error:
            raise self.error
        return lambda *args: (self.name, *args)


@pytest.fixture
def kept():
    found = Programs(threads=2)
    yield found
    found.close()


def test_a_program_is_compiled_once(kept):
    makers = [Maker("a"), Maker("a again"), Maker("b")]
    first, again, other = (
        kept.get(key, make) for key, make in zip(("a", "a", "b"), makers, strict=True)
    )
    assert first is again is not other
    assert len(kept) == 2
    assert (first(1, 2), again(3), other()) == (("a", 1, 2), ("a", 3), ("b",))
    assert [m.count for m in makers] == [1, 0, 1]
    assert kept.made == 2


def test_it_is_compiled_before_it_is_called(kept):
    begin = threading.Event()
    makers = [Maker(i, begin) for i in range(2)]  # as many as threads: nothing waits for a call
    found = [kept.get(i, make) for i, make in enumerate(makers)]
    assert not any(program.ready for program in found)
    begin.set()
    for _ in range(1000):
        if all(program.ready for program in found):
            break
        threading.Event().wait(0.01)
    assert all(program.ready for program in found)
    assert [m.count for m in makers] == [1, 1]


def test_who_needs_it_first_compiles_it_and_the_others_wait():
    begin = threading.Event()
    make = Maker("a", begin)
    program = Program(make)
    results = []
    threads = [threading.Thread(target=lambda: results.append(program())) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert results == []
    begin.set()
    for thread in threads:
        thread.join(10)
    assert results == [("a",)] * 4
    assert make.count == 1


def test_an_error_is_the_callers(kept):
    make = Maker("a", error=ValueError("does not fit"))
    program = kept.get("a", make)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not fit"):
            program()
    assert not program.ready
    assert kept.made == 0
    # The thread that met it goes on with others.
    assert kept.get("b", Maker("b"))() == ("b",)


def test_what_is_forgotten_is_compiled_again(kept):
    make = Maker("a")
    program = kept.get("a", make)
    program()
    program.forget()
    assert not program.ready
    assert kept.get("a", Maker("other")) is program
    assert program(1) == ("a", 1)
    assert make.count == kept.made == 2


def test_the_half_not_asked_for_longest_is_forgotten(kept, monkeypatch):
    crowded = [True]
    asked = []
    monkeypatch.setattr(programs, "_crowded", lambda: asked.append(1) or crowded[0])
    makers = [Maker(i) for i in range(60)]
    found = [kept.get(i, make) for i, make in enumerate(makers[:49])]
    kept.wait()
    kept.make_room()
    assert not asked  # to count takes a while
    found += [kept.get(i, makers[i]) for i in range(49, 60)]
    kept.wait()
    for i in range(10):
        kept.get(i, makers[i])
    kept.make_room()
    assert len(asked) == 1
    assert [i for i, program in enumerate(found) if not program.ready] == list(range(10, 40))
    assert len(kept) == 60
    kept.make_room()  # no more before another 50 were made
    assert sum(program.ready for program in found) == 30
    assert len(asked) == 1
    assert found[20](1) == (20, 1)
    # With room, nothing is forgotten.
    crowded[0] = False
    for program in found:
        program.forget()
    kept.wait()
    kept.make_room()
    assert len(asked) == 2
    assert all(program.ready for program in found)


def test_near_the_limit_of_mappings(monkeypatch, tmp_path):
    """Linux's two files, and machines that have none."""
    files = {"/proc/sys/vm/max_map_count": tmp_path / "limit", "/proc/self/maps": tmp_path / "maps"}
    monkeypatch.setattr(programs, "Path", lambda path: files[path])
    assert not programs._crowded()
    files["/proc/sys/vm/max_map_count"].write_text("10\n")
    for lines, expected in ((8, False), (9, True)):
        files["/proc/self/maps"].write_text("mapping\n" * lines)
        assert programs._crowded() == expected


def test_waiting_for_all(kept):
    begin = threading.Event()
    found = [kept.get(i, Maker(i, begin)) for i in range(4)]
    threading.Timer(0.1, begin.set).start()
    kept.wait()
    assert all(program.ready for program in found)


def test_a_step_closes_only_programs_of_its_own(kept):
    for given in (kept, None):
        step = MetaStep(GHN(), optax.identity(), programs=given)
        step.close()
        if given is None:
            with pytest.raises(RuntimeError, match="shutdown"):
                step.engine.programs.get("a", Maker("a"))
    assert kept.get("a", Maker("a"))() == ("a",)


def test_closed_programs_compile_nothing_more():
    begin, kept = threading.Event(), Programs(threads=1)
    makers = [Maker(i, begin) for i in range(3)]
    found = [kept.get(i, make) for i, make in enumerate(makers)]
    assert makers[0].started.wait(10)
    threading.Timer(0.1, begin.set).start()
    kept.close()  # waits for the one that is being compiled
    assert [m.count for m in makers] == [1, 0, 0]
    assert found[0]() == (0,)
    assert found[1]() == (1,)  # but who calls one has it
