"""Is the noise random? Hypothesis tests that are planned before they run, and what rounding leaves of the noise.

plan: tests and samples            sources: the package's noise, and noise that is broken on purpose
uniformity: statistics, their laws battery: dieharder on the words of ``words.cpp``
run: all tests, with records       rounding: what 16 bits keep        report: docs/randomness.md from the records
"""
