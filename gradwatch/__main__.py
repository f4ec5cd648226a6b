"""`python -m gradwatch` is the command `gradwatch`."""

from __future__ import annotations

import sys

from gradwatch.cli import main

sys.exit(main())
