"""The demo: three students distilled from a shipped teacher on annotated aerial photographs, in minutes on a CPU.

Run it with ``ikd-fast demo``; the parts are importable one by one (``data``, ``train``, ``evaluate``, ``pictures``).
"""
