# Table 1, RetinaNet: FKD. Paper: 39.6 COCO val box AP.
_base_ = "./retinanet_x101-64x4d_r50_fkd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
