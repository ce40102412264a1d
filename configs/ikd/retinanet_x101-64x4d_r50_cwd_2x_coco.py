# Table 1, RetinaNet: CWD. Paper: 40.8 COCO val box AP. Published: 40.5 (mmdetection-distiller).
_base_ = "./retinanet_x101-64x4d_r50_cwd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
