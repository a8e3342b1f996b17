"""Does NEFTune's noise do here what its paper reports? See ``run``, which states the question before it looks.

plan: presets and runs             data: texts and pairs        prepare, pretrained: what the runs start from
training: one run                  measures: of answers         intervals: of differences
run: all runs, with records        report, report_pretrained: docs/effect.md from the records
"""
