PLOTS = ()
def plot(result): pass
