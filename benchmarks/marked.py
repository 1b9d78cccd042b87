"""The generated parts of a page: what stands between two marks of a name."""


def written(page, parts):
    """The page with each of the ``parts``, by name, between its marks where it has any.

    The marks are ``<!-- name: begin -->`` and ``<!-- name: end -->``.
    """
    for name, text in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if page.count(begin) > 1 or page.count(begin) != page.count(end):
            raise ValueError(f"a page has not {begin} and {end}, once each")
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page
