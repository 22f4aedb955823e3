"""What pages say of themselves."""

import page_finish


def test_a_description_is_the_first_words_without_equations():
    body = "<h1>T</h1><p>Why <em>so</em> small &amp; good?</p>\n<p>It is \\(x\\).</p><p>Then this.</p>"
    assert page_finish.description(body) == "Why so small & good? Then this."
    long = "<p>" + "word " * 100 + "</p>"
    assert len(page_finish.description(long)) <= page_finish.LONGEST + 2
    assert page_finish.description(long).endswith("word …")
