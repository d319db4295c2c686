"""python -m timm_nonlocal.inspect"""

import sys

from .command import main

sys.exit(main())
