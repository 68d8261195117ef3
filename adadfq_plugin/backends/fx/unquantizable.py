def leave_in_float(mapping, traced):
    return mapping
