"""Python imports this first where its folder is in PYTHONPATH: what a tool and its children read is written down."""

import os

from tests.helpers.readings import write_down

write_down(os.environ["CONFIG_READINGS"])
