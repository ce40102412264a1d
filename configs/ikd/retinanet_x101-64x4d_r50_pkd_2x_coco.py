# RetinaNet: PKD. Published: 40.8 (mmrazor).
_base_ = "./retinanet_x101-64x4d_r50_pkd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
