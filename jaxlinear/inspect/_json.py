"""JSON of which a difference is read line by line."""

import json


def as_json(document):
    """JSON with a line for each value, and for each row of a list of rows."""

    def line(value):
        return json.dumps(value, ensure_ascii=False)

    def lines(value):
        if not isinstance(value, list) or not value:
            return line(value)
        return "[\n" + ",\n".join(map(line, value)) + "\n]"

    values = (f"{line(name)}: {lines(value)}" for name, value in document.items())
    return "{\n" + ",\n".join(values) + "\n}"
