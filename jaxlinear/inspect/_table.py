"""Tables that read well as text and that a notebook renders: Markdown."""


def table(header, rows):
    """A Markdown table with aligned columns; the first to the left, others right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells):
        first, *rest = zip(cells, widths, strict=True)
        aligned = [f"{first[0]:<{first[1]}}", *(f"{c:>{w}}" for c, w in rest)]
        return f"| {' | '.join(aligned)} |"

    first, *rest = widths
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in rest)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])
