"""The built-in corpus of docstrings."""

from pathlib import Path

from ds_stacking.data.sources.documentation import docstrings, documentation

MODULE = '''
"""Module docstring that is long enough to be kept, with a second line to make sure of that."""
import nothing_that_exists

class Thing:
    """
    Class docstring that is long enough to be kept,
        indented in its second line.
    """

    def tiny(self):
        """Too short."""

    if True:
        async def method(self):
            """Method docstring below a condition, long enough to be kept by the reader too."""

text = """A string that is no docstring, although it is as long as one that would be kept."""
'''


def test_docstrings_in_source_order(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    module, thing, method = docstrings(path)
    assert module.startswith("Module docstring")
    assert thing == "Class docstring that is long enough to be kept,\n    indented in its second line."
    assert method.startswith("Method docstring")


def test_a_module_that_does_not_parse_has_none(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text('"""Docstring of a file that is for another version of the language."""\nprint "hello"\n')
    assert docstrings(path) == []


def test_a_paragraph_that_repeats_a_passage_is_dropped(tmp_path: Path):
    """Whatever surrounds the passage, in other signs of case, with a ruler in between, in another module."""
    words = "the interval between two looks at the file in seconds, or none"
    new = "Nothing of this was said before, " * 6 + "in neither of the two other modules."
    first = f"Head of one.\n\nParameters\n----------\nfirst : {words}; a default is taken.\n\n{new}"
    second = f"Head of two.\n\n{new.replace('this', 'that')}\n\nSECOND: {words.upper()}.\n\n{'Also new words. ' * 15}"
    for name, text in (("a", first), ("b", second)):
        (tmp_path / f"{name}.py").write_text(f'"""{text}"""\n')
    one, two = documentation(sorted(tmp_path.glob("*.py")))
    assert one == first.replace("----------", "")
    assert two.split("\n\n") == ["Head of two.", ("Also new words. " * 15).strip()]


def test_repetitions_are_dropped_and_the_corpus_ends(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(f'"""{"Words of a licence that every file repeats. " * 6}"""\n')
    (tmp_path / "d.py").write_text(f'"""{"Words of its own. " * 20}"""\n')
    (tmp_path / "e.py").write_text(f'"""{"Other words of its own. " * 20}"""\n')
    modules = sorted(tmp_path.glob("*.py"))
    assert [text.split()[0] for text in documentation(modules)] == ["Words", "Words", "Other"]
    assert len(list(documentation(modules, characters=500))) == 2
