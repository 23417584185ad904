"""What a warm process of a test would import for a minute."""

import time

time.sleep(60)
