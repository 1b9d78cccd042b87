"""The picture of a call, as an SVG that has the colours of the text around it.

    python docs/call.py

It writes `docs/call.svg`, which the page `call.md` includes.
"""

import html
import pathlib

PATH = pathlib.Path(__file__).with_suffix(".svg")
WIDTH, LINE, GAP = 380, 17, 22
TITLE = "A call of linear: from the arguments to Y, and from G to the gradients"


class Picture:
    """Rows of boxes, from top to bottom, with an arrow from each row to the next."""

    def __init__(self):
        self.parts, self.bottom = [], 4

    def row(self, *boxes, dashed=False):
        """Boxes of equal width, each a list of lines, of which the first is bold."""
        height = LINE * max(map(len, boxes)) + 12
        width = (WIDTH - 8 * (len(boxes) - 1) - 4) / len(boxes)
        for k, lines in enumerate(boxes):
            left = 2 + k * (width + 8)
            dash = ' stroke-dasharray="4 3"' if dashed else ""
            self.parts.append(
                f'<rect x="{left:.1f}" y="{self.bottom}" width="{width:.1f}"'
                f' height="{height}" rx="5"{dash}/>'
            )
            for n, line in enumerate(lines):
                weight = ' font-weight="bold"' if n == 0 else ""
                y = self.bottom + 17 + n * LINE
                self._text(left + width / 2, y, line, weight)
        self.bottom += height

    def arrow(self, label=""):
        top, end = self.bottom + 2, self.bottom + GAP
        middle = WIDTH / 2
        self.parts.append(f'<path d="M{middle} {top}V{end - 3}m-4 -5l4 5l4 -5"/>')
        if label:
            text = f'<text x="{middle + 10}" y="{top + 14}">{html.escape(label)}</text>'
            self.parts.append(text)
        self.bottom += GAP + 2

    def _text(self, x, y, line, weight):
        text = html.escape(line)
        self.parts.append(
            f'<text x="{x:.1f}" y="{y}" text-anchor="middle"{weight}>{text}</text>'
        )

    def svg(self):
        style = 'fill="none" stroke="currentColor"'
        text = "text{fill:currentColor;stroke:none;font:13px sans-serif}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {style}'
            f' viewBox="0 0 {WIDTH} {self.bottom + 4}" style="max-width:32rem">'
            f"<title>{TITLE}</title><style>{text}</style>{''.join(self.parts)}</svg>\n"
        )


def drawn():
    picture = Picture()
    picture.row(["x", "(*, in)"], ["weight", "(out, in)"], ["bias", "(out,)"])
    picture.arrow()
    picture.row(["linear()", "checks shapes and dtypes, settles dtype"])
    picture.arrow("casts x and weight to dtype")
    picture.row(["Y = X Wᵀ + B", "sum and bias in float32, one rounding to dtype"])
    picture.arrow("Y (*, out)")
    picture.row(
        ["kept: X", "if ∇W is wanted"], ["kept: W", "if ∇X is wanted"], dashed=True
    )
    picture.arrow("G (*, out), like Y")
    picture.row(["∇X", "G W"], ["∇W", "Gᵀ X"], ["∇B", "Σ G"])
    picture.arrow("float32, rounded once")
    picture.row(
        ["∇X", "(*, in)", "dtype of x"],
        ["∇W", "(out, in)", "dtype of weight"],
        ["∇B", "(out,)", "dtype of bias"],
    )
    return picture.svg()


if __name__ == "__main__":
    PATH.write_text(drawn())
