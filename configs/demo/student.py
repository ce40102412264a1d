# The demo's student: half the teacher's backbone width. A plain mmdet config, nothing of ikd_fast's distiller in it.
_base_ = ["../_base_/demo_retinanet.py", "../_base_/demo_data.py", "../_base_/demo_schedule.py"]

model = dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64, 128]))
