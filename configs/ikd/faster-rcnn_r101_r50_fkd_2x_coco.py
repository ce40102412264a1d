# Faster R-CNN: FKD. Published: 39.1 (mmrazor: 12 epochs, from a teacher of 12 epochs).
_base_ = "./faster-rcnn_r101_r50_fkd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
