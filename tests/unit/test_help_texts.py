"""Paragraphs of help in several languages, aligned by their ids."""

from pathlib import Path

from help_texts import HELD_OUT, aligned, paragraphs, split_of

PAGES = {
    "en": """<h1 id="hd_id1">Anchors</h1><p id="par_id2">An <b>anchor</b>
        holds<br>the picture.</p><p id="par_id3">42</p><p id="bm_x">Bookmark</p><p>No id</p>
        <td><p id="par_idN4">Same</p></td><p id="par_id2">Twice</p><div id="par_id5">Box <p>inner</p></div>""",
    "de": """<h1 id="hd_id1">Anker</h1><p id="par_id2">Ein Anker h&auml;lt das Bild.</p><p id="par_id3">42</p>
        <td><p id="par_idN4">Same</p></td>""",
    "ja": """<h1 id="hd_id1"></h1><p id="par_id2">アンカー</p><p id="par_id99">無い</p>""",
}


def test_paragraphs_are_aligned_by_file_and_id(tmp_path: Path) -> None:
    found = {}
    for language, page in PAGES.items():
        folder = tmp_path / language / "usr/share/libreoffice/help" / language / "text" / "shared"
        folder.mkdir(parents=True)
        (folder / "a.html").write_text(f"<html><body>{page}</body></html>", encoding="utf-8")
        (folder / "b.html").write_text(f"<html><body>{page}</body></html>", encoding="utf-8")
        found[language] = paragraphs(tmp_path / language)
    assert found["en"]["shared/a.html", "par_id2"] == "An anchor holds the picture."
    assert {key for name, key in found["en"] if name == "shared/a.html"} == {
        "hd_id1", "par_id2", "par_id3", "par_idN4", "par_id5",
    }  # fmt: skip
    assert aligned(found) == [  # each once, though two files have them; what nobody translated is not there
        {"en": "Anchors", "de": "Anker"},
        {"en": "An anchor holds the picture.", "de": "Ein Anker hält das Bild.", "ja": "アンカー"},
    ]


def test_the_english_text_alone_says_what_is_held_out() -> None:
    splits = [split_of(f"Paragraph {i}.") for i in range(20_000)]
    assert splits == [split_of(f"Paragraph {i}.") for i in range(20_000)]
    for name, share in HELD_OUT.items():
        assert abs(splits.count(name) - 20 * share) < 60
    assert set(splits) == {"train", *HELD_OUT}
